"""S3 file systems that retry for longer than Arrow's default, and the options that they were made with."""

from typing import Any, Final

import pyarrow.fs as pafs

_MAX_ATTEMPTS: Final = 10
"""About 50 s in total: the pauses between attempts grow to 20 s. Arrow's default of 3 attempts gives up after 6 s."""

_BOTO3_NAMES: Final = {
    "access_key": "aws_access_key_id",
    "secret_key": "aws_secret_access_key",
    "session_token": "aws_session_token",
    "region": "region_name",
}


class RetryingS3FileSystem(pafs.S3FileSystem):
    """An S3 file system with 10 attempts per request that keeps them when it is pickled.

    Arrow does not pickle the retry strategy, so on Ray's workers a plain S3FileSystem would be back at 3 attempts.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=_MAX_ATTEMPTS))
        self._options = options

    def __reduce__(self) -> Any:
        return _retrying_s3, (self._options,)


def _retrying_s3(options: dict[str, Any]) -> RetryingS3FileSystem:
    return RetryingS3FileSystem(**options)


def s3_options(filesystem: pafs.S3FileSystem) -> dict[str, Any]:
    """Keyword arguments for S3FileSystem that make an equal file system.

    pyarrow has no public accessor for them, and the URI does not have them all: `FileSystem.from_uri` also reads
    AWS_ENDPOINT_URL and asks S3 for the region of the bucket. Only the pickle protocol gives them: a constructor that takes
    one dict, and that dict. tests/storage/test_s3.py fails when a version of pyarrow changes this.
    """
    options: dict[str, Any] = filesystem.__reduce__()[1][0]
    return options


def boto3_options(filesystem: pafs.S3FileSystem) -> dict[str, str]:
    """Keyword arguments for `boto3.client` that reach the same S3.

    Keys that Arrow found in the environment or in ~/.aws are not among them: boto3 finds these itself.
    """
    given = s3_options(filesystem)
    options = {boto3_name: given[name] for name, boto3_name in _BOTO3_NAMES.items() if given.get(name)}
    endpoint = given.get("endpoint_override")
    if endpoint:
        options["endpoint_url"] = endpoint if "://" in endpoint else f"{given.get('scheme') or 'https'}://{endpoint}"
    return options
