"""What an error of the SDK means to a user: whose fault it is, in words that name the object and the way out.

Messages are built from codes and names only, never from requests, so no credential can get into one.
"""

from __future__ import annotations

from botocore import exceptions as aws
from urllib3.exceptions import HTTPError

from finetune_trainer.errors import PermissionRefusedError, TrainerError, UsageError
from finetune_trainer.storage.errors import ChangedError, MissingContainerError, MissingError, TransientError
from finetune_trainer.storage.settings import host_of
from finetune_trainer.storage.uris import Location

PERMISSIONS = {
    "head_object": "s3:GetObject (and s3:ListBucket, without which a missing object reads as forbidden)",
    "get_object": "s3:GetObject (and s3:ListBucket, without which a missing object reads as forbidden)",
    "list_objects_v2": "s3:ListBucket",
    "delete_objects": "s3:DeleteObject",
    "abort_multipart_upload": "s3:AbortMultipartUpload",
}
"""What a policy must allow for an operation; all others write and need s3:PutObject."""

WRONG_KEYS = {
    "InvalidAccessKeyId": "the access key is not known there",
    "SignatureDoesNotMatch": "the secret key does not belong to the access key",
    "ExpiredToken": "the session token has expired",
    "InvalidToken": "the session token is not valid",
    "TokenRefreshRequired": "the session token has expired",
}
TRANSIENT_CODES = {
    "BadDigest",
    "IncompleteBody",
    "InternalError",
    "OperationAborted",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "XAmzContentSHA256Mismatch",
}
WRONG_REGION = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
NOBODY_WRITES = "nobody may write to the inputs of a running job; start again to read the new version"
MISSING_KEYS = {"NoSuchKey", "NoSuchVersion", "404"}


def translate(error: Exception, operation: str, where: Location, endpoint: str) -> Exception:
    """A TransientError where the next try may work, else the TrainerError to stop with."""
    if isinstance(error, aws.ClientError):
        return _refused(error, operation, where, endpoint)
    if isinstance(error, (aws.NoCredentialsError, aws.PartialCredentialsError, aws.CredentialRetrievalError)):
        return PermissionRefusedError(
            f"no complete credentials for {operation} on {where}",
            "name a Secret in storage.s3.secretName or a serviceAccountName with a cloud role",
        )
    if isinstance(error, aws.SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(error):
        return UsageError(
            f"the certificate of {host_of(endpoint)} is not trusted ({operation} on {where})",
            "put the CA that signed it into the ConfigMap that storage.s3.caBundleConfigMap names",
        )
    if isinstance(error, (aws.ParamValidationError, aws.InvalidRegionError)):
        return UsageError(f"S3 has no such name or region: {operation} on {where}: {error}")
    if isinstance(error, (aws.ConnectionError, aws.HTTPClientError, aws.IncompleteReadError, HTTPError, OSError)):
        return TransientError(f"{operation} on {where} at {host_of(endpoint)} failed: {type(error).__name__}")
    return error


def _refused(error: aws.ClientError, operation: str, where: Location, endpoint: str) -> Exception:
    """The meaning of an answer of the server that is no success."""
    described = error.response.get("Error", {})
    code = str(described.get("Code", ""))
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    return (
        _missing(code, where, endpoint)
        or _passing(code, status, f"{operation} on {where} was answered {status} {code}")
        or _replaced(status, where)
        or _permission(code, status, operation, where)
        or _other(code, described.get("Message", ""), f"{operation} on {where} was answered {status} {code}")
    )


def _missing(code: str, where: Location, endpoint: str) -> Exception | None:
    if code == "NoSuchBucket":
        return MissingContainerError(
            f"there is no bucket `{where.bucket}` at {host_of(endpoint)}", "create it, or correct the bucket in the URI"
        )
    if code in MISSING_KEYS:
        return MissingError(f"there is no object {where}", "correct the URI, or upload the object")
    return None


def _passing(code: str, status: int, message: str) -> Exception | None:
    return TransientError(message) if code in TRANSIENT_CODES or status >= 500 or status == 429 else None


def _replaced(status: int, where: Location) -> Exception | None:
    return ChangedError(f"{where} was replaced while it was read", NOBODY_WRITES) if status == 412 else None


def _permission(code: str, status: int, operation: str, where: Location) -> Exception | None:
    if code in WRONG_KEYS:
        return PermissionRefusedError(
            f"{operation} on {where} was refused: {WRONG_KEYS[code]} ({code})",
            "correct the keys in the Secret that storage.s3.secretName names",
        )
    if code == "RequestTimeTooSkewed":
        return PermissionRefusedError(
            f"{operation} on {where} was refused: the clock here is wrong", "set the node's clock"
        )
    if status not in (401, 403):
        return None
    return PermissionRefusedError(
        f"{operation} on {where} was refused: these credentials may not do it ({code})",
        f"allow {PERMISSIONS.get(operation, 's3:PutObject')} on bucket `{where.bucket}`, key `{where.key}`",
    )


def _other(code: str, message: str, answered: str) -> Exception:
    if code in WRONG_REGION:
        return UsageError(f"{answered}: the bucket is in another region", "set storage.s3.region to it")
    return TrainerError(f"{answered}: {message}")
