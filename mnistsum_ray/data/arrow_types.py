"""Ray's Arrow extension types, read as the plain types that they are stored as."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import pyarrow as pa

_NAME: Final = b"ARROW:extension:name"
_METADATA: Final = b"ARROW:extension:metadata"

# Type name -> storage type and metadata of some instance. With these, `_registered_types` finds the Python class.
_RAY_TYPES: Final = {
    "ray.data.arrow_tensor": (pa.list_(pa.int64()), b"[0]"),
    "ray.data.arrow_tensor_v2": (pa.large_list(pa.int64()), b"[0]"),
    "ray.data.arrow_variable_shaped_tensor": (
        pa.struct({"data": pa.large_list(pa.int64()), "shape": pa.list_(pa.int32())}),
        b"1",
    ),
    "ray.data.arrow_pickled_object": (pa.large_binary(), b""),
}

_lock = threading.Lock()
_users = 0
_unregistered: list[pa.ExtensionType] = []


@contextmanager
def plain_arrow_types() -> Iterator[None]:
    """Files opened in the block show columns of Ray's types as plain columns. After the block the types are registered as before.

    Otherwise scored files would need Ray to be read, and files of Ray 2.49 to 2.54, whose metadata is a pickle, could not be
    opened at all. Arrow's registry belongs to the whole process and no reader can ignore it, so the block takes Ray's types out.
    Several threads may be in the block at once. Keep it short: a thread outside of it that deserializes one of Ray's types
    meanwhile gets the plain type too.
    """
    global _users
    with _lock:
        if _users == 0:
            _unregistered[:] = _registered_types()
            for kind in _unregistered:
                pa.unregister_extension_type(kind.extension_name)
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                for kind in _unregistered:
                    pa.register_extension_type(kind)


def _registered_types() -> list[pa.ExtensionType]:
    """An instance of each of Ray's types that is registered in this process.

    Arrow has no public lookup by name. Reading a serialized schema gives instances of the types that are registered, and plain
    types for the others.
    """
    fields = [
        pa.field(name, storage, metadata={_NAME: name.encode(), _METADATA: metadata})
        for name, (storage, metadata) in _RAY_TYPES.items()
    ]
    schema = pa.ipc.read_schema(pa.schema(fields).serialize())
    return [field.type for field in schema if isinstance(field.type, pa.ExtensionType)]


def without_ray_marks(field: Any) -> Any:
    """The field without the metadata that marks it as one of Ray's types; files written with the field have the plain type."""
    metadata = field.metadata or {}
    if metadata.get(_NAME, b"").decode(errors="replace") not in _RAY_TYPES:
        return field
    return field.with_metadata({key: value for key, value in metadata.items() if key not in (_NAME, _METADATA)})
