"""S3 file systems keep their options and their retries, in another process too. No requests are made."""

import pickle

import pytest
from pyarrow.fs import S3FileSystem

from mnistsum_ray.storage.paths import locate
from mnistsum_ray.storage.s3 import RetryingS3FileSystem, boto3_options, s3_options

URI = "s3://AKIA:secret@bucket/a?region=eu-west-1&endpoint_override=127.0.0.1:9&scheme=http"


def test_the_options_of_an_s3_file_system_make_an_equal_one() -> None:
    filesystem = locate(URI, "--output").filesystem
    broken = "pyarrow: S3FileSystem.__reduce__ no longer gives the options of the constructor; see storage/s3.py"
    assert isinstance(filesystem, S3FileSystem)
    try:
        options = s3_options(filesystem)
    except Exception as error:
        pytest.fail(f"{broken} ({error!r})")
    given = {
        "access_key": "AKIA",
        "secret_key": "secret",
        "region": "eu-west-1",
        "endpoint_override": "127.0.0.1:9",
        "scheme": "http",
    }
    assert {name: options.get(name) for name in given} == given, broken
    assert S3FileSystem(**options).equals(filesystem), broken


def test_retries_are_kept_in_another_process() -> None:
    place = locate(URI, "--output").with_retries()
    there = pickle.loads(pickle.dumps(place))
    assert type(there.filesystem) is type(place.filesystem) is RetryingS3FileSystem
    assert there == place
    assert place.with_retries() is place
    assert s3_options(there.filesystem) == s3_options(place.filesystem)


def test_boto3_reaches_the_same_s3() -> None:
    expected = {
        "aws_access_key_id": "AKIA",
        "aws_secret_access_key": "secret",
        "region_name": "eu-west-1",
        "endpoint_url": "http://127.0.0.1:9",
    }
    place = locate(URI, "--output")
    assert boto3_options(place.filesystem) == boto3_options(place.with_retries().filesystem) == expected
    assert boto3_options(locate("s3://bucket/a?region=eu-west-1", "--output").filesystem) == {"region_name": "eu-west-1"}
