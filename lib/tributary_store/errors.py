"""What can go wrong at the store, told apart by what the caller should do about it."""

from __future__ import annotations


class StoreError(Exception):
    """Base of all; its text names the object and what to change."""


class ObjectMissing(StoreError):
    """There is no such object or bucket."""


class AccessDenied(StoreError):
    """This identity may not do that: a matter of policy or credentials; retrying does not help."""


class CredentialsRefused(AccessDenied):
    """The store does not know the identity, or its secret is wrong."""


class StoreUnreachable(StoreError):
    """No answer, or a server error: wait and try again."""


class ObjectExists(StoreError):
    """A create-only object exists already, with other bytes."""


class ObjectDamaged(StoreError):
    """The bytes are not those that a digest or a length promises."""


class BundleRefused(StoreError):
    """A directory cannot become a model bundle; the text says which file is wrong and what to do."""
