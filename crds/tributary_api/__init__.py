"""The contract of Tributary: custom resources, the worker's tasks, and every record in the object store."""
