"""Arrow column types that can hold images or numbers.

Images: 784 integers in a list or a fixed-size list, 28x28 nested lists, an Arrow or Ray tensor, 784 raw bytes, PNG or JPEG bytes,
or a struct around any of these bytes. Numbers: any integer type. Both may be dictionary-encoded.
"""

import pyarrow as pa


def image_type_error(kind: pa.DataType) -> str | None:
    """Why a column of this type cannot hold images; None where it can."""
    if isinstance(kind, pa.FixedShapeTensorType) and list(kind.permutation or ()) != sorted(kind.permutation or ()):
        return f"is a tensor whose dimensions are permuted ({kind})"
    storage = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    if pa.types.is_dictionary(storage):
        storage = storage.value_type
    if pa.types.is_struct(storage):
        field = image_field(storage)
        if field is None:
            return f"is a struct without the field 'bytes' ({kind})"
        storage = storage.field(field).type
    if _is_bytes(storage) or pa.types.is_null(storage):
        return None
    levels = 0
    while is_list(storage):
        storage, levels = storage.value_type, levels + 1
    if levels in (1, 2) and pa.types.is_integer(storage):
        return None
    return f"has type {kind}, which holds no images (lists of 784 integers, 784 bytes, PNG or JPEG bytes, {{bytes, path}})"


def number_type_error(kind: pa.DataType) -> str | None:
    """Why a column of this type cannot hold numbers; None where it can."""
    values = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_integer(values) or pa.types.is_null(values):
        return None
    return f"has type {kind}, not an integer type"


def image_field(kind: pa.StructType) -> str | None:
    """Name of the struct's field with the image: in Hugging Face's {bytes, path}, or in Ray's tensor {data, shape}."""
    return next((name for name in ("bytes", "data") if kind.get_field_index(name) >= 0), None)


def is_list(kind: pa.DataType) -> bool:
    """True for lists with 32-bit or 64-bit offsets and for lists of a fixed size."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))
