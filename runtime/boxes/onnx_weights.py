"""What the tensors of an ONNX file claim to take, whether that much is stored, and where."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from rewriter.runtime.errors import BoxError

_BITS = {
    **dict.fromkeys(("COMPLEX128",), 128),
    **dict.fromkeys(("DOUBLE", "INT64", "UINT64", "COMPLEX64"), 64),
    **dict.fromkeys(("FLOAT", "INT32", "UINT32"), 32),
    **dict.fromkeys(("FLOAT16", "BFLOAT16", "INT16", "UINT16"), 16),
    **dict.fromkeys(("BOOL", "INT8", "UINT8"), 8),
    **dict.fromkeys(("FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ", "FLOAT8E8M0"), 8),
    **dict.fromkeys(("INT4", "UINT4", "FLOAT4E2M1"), 4),
    **dict.fromkeys(("INT2", "UINT2"), 2),
}
_VALUES = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")
_SMALL = 1024  # bytes: what tensors that hold shapes keep within


class Weights:
    """The constants of one file, added one by one: refuses those that do not hold what they claim.

    files: where constants lie that are not in the file itself, by the name there: regular files in the folder of `path`
    total: bytes that all of them take in memory; `add` raises `BoxError` once they exceed `max_bytes`
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.path, self.max_bytes = path, max_bytes
        self.files: dict[str, Path] = {}
        self.total = 0
        # The path may be a link, as in caches that keep contents under their hash; the weights lie beside either end.
        self._folders = (path.parent.resolve(), path.resolve().parent)

    def add(self, tensor: Any) -> None:
        """Check a TensorProto. Raises `BoxError`."""
        if any(size < 0 for size in tensor.dims):
            raise self._error(tensor, f"has the shape {list(tensor.dims)}")
        count, bits = _product(tensor.dims), self._bits(tensor)
        taken = -(-count * bits // 8)
        self._take(tensor, taken)
        if tensor.data_location == type(tensor).EXTERNAL:
            self._add_external(tensor, taken)
        elif tensor.HasField("raw_data"):
            self._compare(tensor, len(tensor.raw_data), taken, "bytes")
        else:
            stored = sum(len(getattr(tensor, name)) for name in _VALUES)
            packed = taken if 0 < bits < 8 else 2 * count if _type_name(tensor).startswith("COMPLEX") else count
            self._compare(tensor, stored, packed, "values")

    def add_sparse(self, sparse: Any) -> None:
        """Check a SparseTensorProto, which onnxruntime makes dense. Raises `BoxError`."""
        self.add(sparse.values)
        self.add(sparse.indices)
        if any(size < 0 for size in sparse.dims):
            raise self._error(sparse.values, f"has the shape {list(sparse.dims)}")
        self._take(sparse.values, _product(sparse.dims) * self._bits(sparse.values) // 8)

    def check_value(self, value: Any) -> None:
        """Check that the fixed dimensions of a ValueInfoProto do not claim more than `max_bytes`.

        Nor may its name, or the name of a free dimension, be undecodable. Raises `BoxError`.
        """
        kind = value.type.tensor_type
        if any(isinstance(text, bytes) for text in (value.name, *(size.dim_param for size in kind.shape.dim))):
            raise BoxError(f"a name in {self.path.name} is no UTF-8 text: {value.name!r}", where=str(self.path))
        sizes = [size.dim_value for size in kind.shape.dim if size.dim_value > 0]
        claimed = _product(sizes) * _BITS.get(_type_name(kind), 8) // 8
        if claimed > self.max_bytes:
            raise self.too_large(f"{value.name} of {self.path.name} claims {claimed:,} bytes")

    def too_large(self, what: str) -> BoxError:
        """The error for what exceeds `max_bytes`."""
        return BoxError(
            what,
            where=str(self.path),
            why=f"the limit is {self.max_bytes:,} bytes",
            remedy="if the file can be trusted, raise the limit: OnnxBox(path, max_bytes=...)",
        )

    def _take(self, tensor: Any, taken: int) -> None:
        self.total += taken
        if self.total > self.max_bytes:
            raise self.too_large(
                f"the constants of {self.path.name} up to {tensor.name or 'one'} claim {self.total:,} bytes"
            )

    def _bits(self, tensor: Any) -> int:
        name = _type_name(tensor)
        if name == "STRING":
            return 0  # no fixed size; their number is compared
        if name not in _BITS:
            raise self._error(tensor, f"has elements of an unknown type ({tensor.data_type})")
        return _BITS[name]

    def _add_external(self, tensor: Any, taken: int) -> None:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        file = self._confined(tensor, location)
        offset = self._number(tensor, entries, "offset") or 0
        length = self._number(tensor, entries, "length")
        self._compare(tensor, taken if length is None else length, taken, "bytes")
        if offset + taken > file.stat().st_size:
            why = f"bytes {offset:,} to {offset + taken:,} of {file.name}, which has {file.stat().st_size:,}"
            raise self._error(tensor, f"lies outside its file: {why}")
        self.files[location] = file

    def _confined(self, tensor: Any, location: str) -> Path:
        """The regular file meant by `location`; on no system may it lead out of the folder."""
        kinds = [kind(location) for kind in (PurePosixPath, PureWindowsPath)]
        if not location or "*" in location or any(kind.anchor or ".." in kind.parts for kind in kinds):
            raise self._error(tensor, f"is stored at {location!r}, which is not a path inside the file's own folder")
        named = self.path.parent / location
        file = named.resolve()
        if not any(file.is_relative_to(folder) for folder in self._folders):
            raise self._error(tensor, f"is stored at {location!r}, a link that leads out of the file's own folder")
        if not file.is_file():
            raise BoxError(
                f"the weights of {self.path.name} are missing: {location}",
                where=str(self.path),
                why=f"the constant {tensor.name} is stored in {named}",
                remedy="keep the file with the weights beside the model, under its first name",
            )
        return file

    def _number(self, tensor: Any, entries: dict[str, str], key: str) -> int | None:
        if key not in entries:
            return None
        if not (entries[key].isascii() and entries[key].isdigit()):
            raise self._error(tensor, f"has the {key} {entries[key]!r} in its file")
        return int(entries[key])

    def _compare(self, tensor: Any, stored: int, claimed: int, unit: str) -> None:
        if stored != claimed:
            raise self._error(tensor, f"claims {claimed:,} {unit} where {stored:,} are stored")

    def _error(self, tensor: Any, what: str) -> BoxError:
        return BoxError(
            f"the constant {tensor.name or '(without a name)'} of {self.path.name} {what}",
            where=str(self.path),
            remedy="export the model again, or fetch the file again; if that does not help, do not trust it",
        )


def constants(owner: Any) -> Iterator[Any]:
    """The TensorProtos of a graph and of its nodes' attributes, sparse ones and inner graphs left out."""
    yield from getattr(owner, "initializer", ())
    for attribute in attributes(owner):
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors


def sparse_constants(owner: Any) -> Iterator[Any]:
    """The SparseTensorProtos of a graph and of its nodes' attributes, inner graphs left out."""
    yield from getattr(owner, "sparse_initializer", ())
    for attribute in attributes(owner):
        if attribute.HasField("sparse_tensor"):
            yield attribute.sparse_tensor
        yield from attribute.sparse_tensors


def attributes(owner: Any) -> Iterator[Any]:
    """The attributes of a graph's or a function's nodes, and the defaults that a function declares."""
    for node in owner.node:
        yield from node.attribute
    yield from getattr(owner, "attribute_proto", ())


def lighten(owner: Any) -> None:
    """Empty what is too large to be a shape, in place: inferring shapes copies a graph several times."""
    for tensor in constants(owner):
        if tensor.ByteSize() > _SMALL:
            for name in ("raw_data", *_VALUES):
                tensor.ClearField(name)
    for attribute in attributes(owner):
        for name in ("floats", "ints", "strings"):
            if len(getattr(attribute, name)) > _SMALL // 8:
                attribute.ClearField(name)


def _type_name(kind: Any) -> str:
    """Of a TensorProto's elements, or of those that a type declares; "" where it is unknown."""
    from onnx import TensorProto

    number = kind.data_type if isinstance(kind, TensorProto) else kind.elem_type
    values: list[int] = TensorProto.DataType.values()
    return str(TensorProto.DataType.Name(number)) if number in values else ""


def _product(sizes: Any) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product
