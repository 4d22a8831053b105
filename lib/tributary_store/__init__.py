"""The S3 object store as all parts use it: keys, create-only records, model bundles, policies."""
