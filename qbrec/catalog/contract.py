"""The input contract (DESIGN section 2): which columns a domain brings, and what is wrong with them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pyarrow as pa

from qbrec.catalog.sources import SourceFile, list_files, open_parquet
from qbrec.config.sections import CatalogConfig, DataConfig
from qbrec.errors import ConfigError, DataError

EMBEDDING = "_embedding"
_MODALITY = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")
Check = Callable[[pa.DataType], bool]


def is_text(kind: pa.DataType) -> bool:
    """Whether a column holds strings."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def is_list(kind: pa.DataType) -> bool:
    """Whether a column holds lists, of fixed length or not."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_time(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_timestamp(kind))


def _is_text_list(kind: pa.DataType) -> bool:
    return is_list(kind) and is_text(kind.value_type)


def _is_vector(kind: pa.DataType) -> bool:
    return is_list(kind) and bool(pa.types.is_floating(kind.value_type))


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_attribute(kind: pa.DataType) -> bool:
    plain = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    return is_text(kind) or _is_text_list(kind) or bool(plain or pa.types.is_decimal(kind))


def _one_or_list(check: Check) -> Check:
    return lambda kind: check(kind.value_type if is_list(kind) else kind)


_TEXT = ("string", is_text)
ITEM_COLUMNS: dict[str, tuple[str, Check]] = {
    "item_id": _TEXT,
    "title": _TEXT,
    "description": _TEXT,
    "brand": _TEXT,
    "categories": ("list<string>, root first", _is_text_list),
    "image": ("binary or list<binary>: the encoded pictures", _one_or_list(_is_bytes)),
    "image_path": ("string or list<string>", _one_or_list(is_text)),
}
_ATTRIBUTE = ("string, list<string>, number or boolean", _is_attribute)
INTERACTION_COLUMNS: dict[str, tuple[str, Check]] = {
    "user_id": _TEXT,
    "item_id": _TEXT,
    "timestamp": ("int64 or timestamp", _is_time),
}


@dataclass(frozen=True)
class Domain:
    """One domain's files and columns.

    Attributes:
        columns: Contract columns its items have.
        embeddings: Column and width by modality, for modalities that come encoded.
        display: Schema of the other columns, carried along.
        attributes: Those of them whose values are text to be encoded (`catalog.text.attributes`).
    """

    number: int
    name: str
    items: tuple[SourceFile, ...]
    interactions: tuple[SourceFile, ...]
    columns: tuple[str, ...]
    embeddings: dict[str, tuple[str, int]] = field(default_factory=dict)
    display: pa.Schema = field(default_factory=lambda: pa.schema([]))
    item_rows: int = 0
    interaction_rows: int = 0
    attributes: tuple[str, ...] = ()

    @property
    def encodes_text(self) -> bool:
        """Whether raw text is encoded here (a `text_embedding` column takes its place)."""
        fields = {"title", "description", "brand", "categories"} & set(self.columns)
        return "text" not in self.embeddings and bool(fields or self.attributes)

    @property
    def picture_column(self) -> str | None:
        """`image` or `image_path`, if pictures are encoded here (an `image_embedding` column comes first)."""
        if "image" in self.embeddings:
            return None
        return next((name for name in ("image", "image_path") if name in self.columns), None)


def read_contract(data: DataConfig, catalog: CatalogConfig) -> list[Domain]:
    """Find the files of all domains and check every file's columns, before a single row is read.

    Raises:
        ConfigError: No domain, `image_path` without allowed places, or an attribute that no domain has.
        DataError: A file or column is missing or has the wrong type; domains contradict each other.
    """
    if not data.domains:
        raise ConfigError(
            "no domain is configured",
            where="data.domains",
            fix="name items and interactions of one domain at least",
        )
    if len(data.domains) > 255:
        raise ConfigError("more than 255 domains", where="data.domains", fix="merge some of them")
    domains = []
    for number, (name, place) in enumerate(data.domains.items()):
        domain = read_items(number, name, place.items, catalog=catalog, where=f"data.domains.{name}.items")
        files = list_files(place.interactions, where=f"data.domains.{name}.interactions")
        _, rows = _check_files(files, INTERACTION_COLUMNS, required=tuple(INTERACTION_COLUMNS))
        _refuse_empty(rows, "interactions", files)
        domains.append(replace(domain, interactions=tuple(files), interaction_rows=rows))
    for column in catalog.text.attributes:
        if not any(column in domain.attributes for domain in domains):
            further = sorted({name for domain in domains for name in domain.display.names})
            raise ConfigError(
                f"no domain has a further column {column!r}",
                where="catalog.text.attributes",
                fix=f"choose from {', '.join(further) or 'nothing: there are no further columns'}",
            )
    _check_agreement(domains)
    return domains


def read_items(number: int, name: str, place: str, *, catalog: CatalogConfig, where: str) -> Domain:
    """A domain by its items alone, without interactions.

    Args:
        number: Number of the domain.
        name: Its name.
        place: File, folder or glob.
        catalog: The catalogue's configuration.
        where: What names the place, for the error message.

    Raises:
        ConfigError: `image_path` without allowed places.
        DataError: A file or column is missing or has the wrong type, or there is no row.
    """
    files = list_files(place, where=where)
    attributes = dict.fromkeys(catalog.text.attributes, _ATTRIBUTE)
    schema, rows = _check_files(files, ITEM_COLUMNS | attributes, required=("item_id",))
    _refuse_empty(rows, "items", files)
    embeddings = {}
    for column in schema.names:
        if column.endswith(EMBEDDING) and column not in ITEM_COLUMNS:
            modality = _modality(column, schema.field(column).type, files[0].path)
            embeddings[modality] = (column, _width(files, column))
    known = {*ITEM_COLUMNS, *(column for column, _ in embeddings.values())}
    domain = Domain(
        number, name, tuple(files), (),
        columns=tuple(c for c in ITEM_COLUMNS if c in schema.names),
        embeddings=embeddings,
        display=pa.schema([f.remove_metadata() for f in schema if f.name not in known]),
        item_rows=rows,
        attributes=tuple(c for c in attributes if c in schema.names and c not in known),
    )  # fmt: skip
    if domain.picture_column == "image_path" and not (catalog.image.roots or catalog.image.hosts):
        raise ConfigError(
            f"the items of {name!r} have image_path, but no place is allowed to be read",
            where="catalog.image.roots",
            fix="list the folders or s3:// and gs:// prefixes the pictures lie in, or their http(s):// "
            "hosts in catalog.image.hosts, or put the picture itself into a column `image`",
        )
    return domain


def _refuse_empty(rows: int, role: str, files: list[SourceFile]) -> None:
    if rows == 0:
        raise DataError(f"there is not a single row of {role}", where=files[0].path, fix=f"bring {role}")


def _check_files(
    files: list[SourceFile], known: dict[str, tuple[str, Check]], *, required: tuple[str, ...]
) -> tuple[pa.Schema, int]:
    """Schema of the first file and rows of all, after every file was checked."""
    first: pa.Schema | None = None
    rows = 0
    for file in files:
        parquet = open_parquet(file.path)
        schema = parquet.schema_arrow
        rows += parquet.metadata.num_rows
        for column in required:
            if column not in schema.names:
                raise DataError(
                    f"the column {column!r} is missing",
                    where=f"{file.path}: columns present are {', '.join(schema.names)}",
                    fix=f"rename or add the column {column!r}",
                )
        for column in schema.names:
            what, check = known.get(column, ("", None))
            if check is not None and not check(schema.field(column).type):
                raise DataError(
                    f"the column {column!r} is {schema.field(column).type} instead of {what}",
                    where=file.path,
                    fix=f"write {column!r} as {what}",
                )
        if first is None:
            first = schema
        elif schema.names != first.names and set(schema.names) != set(first.names):
            odd = sorted(set(schema.names) ^ set(first.names))
            raise DataError(
                f"files of one table have different columns: {', '.join(odd)}",
                where=f"{files[0].path} and {file.path}",
                fix="write all files with the same columns",
            )
    assert first is not None
    return first, rows


def _modality(column: str, kind: pa.DataType, path: str) -> str:
    modality = column.removesuffix(EMBEDDING)
    if not _is_vector(kind):
        raise DataError(
            f"the column {column!r} is {kind} instead of a list of floats",
            where=path,
            fix="write float vectors",
        )
    if _MODALITY.fullmatch(modality) is None or modality == "structure":
        raise DataError(
            f"{modality!r} cannot be the name of a modality",
            where=f"{path}: column {column}",
            fix="use lower-case letters, digits and _; `structure` is taken by categories and brand",
        )
    return modality


def _width(files: list[SourceFile], column: str) -> int:
    """Width of an embedding: of its type, else the most frequent one in the first row group that has any."""
    for file in files:
        parquet = open_parquet(file.path)
        kind = parquet.schema_arrow.field(column).type
        if pa.types.is_fixed_size_list(kind):
            return int(kind.list_size)
        for group in range(parquet.num_row_groups):
            lengths = Counter(
                pa.compute.list_value_length(parquet.read_row_group(group, columns=[column])[column])
                .drop_null()
                .to_pylist()
            )
            lengths.pop(0, None)
            if lengths:
                return int(max(lengths, key=lambda width: (lengths[width], width)))
    raise DataError(
        f"the column {column!r} is empty in every row", where=files[0].path, fix="remove the column"
    )


def _check_agreement(domains: list[Domain]) -> None:
    """One fusion serves all domains, so a modality must be made the same way in all of them."""
    made: dict[str, tuple[str, str]] = {}
    for domain in domains:
        ways = {
            m: f"the column {column} of width {width}" for m, (column, width) in domain.embeddings.items()
        }
        if domain.encodes_text:
            ways["text"] = "raw text"
        if domain.picture_column:
            ways["image"] = "pictures"
        for modality, way in ways.items():
            other, how = made.setdefault(modality, (domain.name, way))
            if how != way:
                raise DataError(
                    f"the modality {modality!r} is made of {how} in one domain and of {way} in another",
                    where=f"domains {other!r} and {domain.name!r}",
                    fix="bring the same kind of column, with the same width, in all domains",
                )
    if not made and not any({"categories", "brand"} & set(domain.columns) for domain in domains):
        raise DataError(
            "the items have nothing to learn from",
            where=domains[0].items[0].path,
            fix="bring a title, description, categories, brand, image or <name>_embedding column at least",
        )
