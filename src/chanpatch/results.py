"""Base classes for results: text tables, HTML tables, and effects that can be ranked."""

from __future__ import annotations

import html
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from typing_extensions import Self

from .errors import MissingPackageError, StatisticsError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROWS = 20  # maximum number of rows in a table or figure


class Records:
    """A result that prints as a table: a title, the first rows, and notes.

    A subclass defines `to_records`, and may override `_lines` (the table's records), `_title`, `_notes` and `_most`.
    """

    _most: ClassVar[int | None] = ROWS  # maximum number of rows in the table; None for no maximum

    def to_records(self) -> list[dict[str, Any]]:
        """Return one dict per row."""
        raise NotImplementedError

    def to_pandas(self) -> Any:
        """Return the records as a pandas data frame."""
        return imported("pandas").DataFrame(self.to_records())

    def __repr__(self) -> str:
        lines, notes = self._table()
        return "\n".join([self._title(), *table(lines), *notes])

    def _repr_html_(self) -> str:
        lines, notes = self._table()
        head, *body = [
            "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"
            for tag, row in zip(("th", *["td"] * len(lines)), _cells(lines) or [[]], strict=True)
        ]
        title, *below = [f"<p>{html.escape(text)}</p>" for text in (self._title(), *notes)]
        return f"{title}<table><thead>{head}</thead><tbody>{''.join(body)}</tbody></table>{''.join(below)}"

    def _table(self) -> tuple[list[dict[str, Any]], list[str]]:
        """Return the records shown in the table, and the lines of text below the table."""
        lines = self._lines()
        shown = lines[: self._most]
        return shown, [*more(len(lines) - len(shown)), *self._notes()]

    def _lines(self) -> list[dict[str, Any]]:
        return self.to_records()

    def _title(self) -> str:
        return type(self).__name__

    def _notes(self) -> list[str]:
        return []


class Effects(Records):
    """A result with one effect per row. The table and `top` show the largest effects first.

    A subclass is a dataclass that defines `effect` and `effect_label`. `_by_row` lists the fields that have one entry
    per row; the first field in the list contains the labels of the rows.
    """

    _by_row: ClassVar[tuple[str, ...]]

    if TYPE_CHECKING:

        @property
        def effect_label(self) -> str:
            """Axis label in figures: the kind and unit of the effects, and the number of inputs."""

    def __len__(self) -> int:
        return len(getattr(self, self._by_row[0]))

    def effect(self) -> NDArray[np.float64]:
        """Return each row's effect."""
        raise NotImplementedError

    def differences(self) -> NDArray[np.float64]:
        """Return the effects with shape `(row, input)`, or `(row, 1)` if only the means over the inputs are known."""
        return self.effect()[:, None]

    def top(self, count: int) -> Self:
        """Return a result with only the `count` largest rows by absolute effect, largest first; NaN comes last.

        Raises:
            StatisticsError: If the count is negative.
        """
        return self._top(count, self.effect())

    def plot(self, ax: Axes | None = None) -> Axes:
        """Plot the largest effects, on new axes if `ax` is None; see `chanpatch.plots.effect_ranking`."""
        axes: Axes = imported("chanpatch.plots").effect_ranking(self._effects(), ax, label=self.effect_label)
        return axes

    def grid(self, rows: int = 0, cols: int = 1) -> Grid:
        """Arrange the effects in a matrix by two parts of each label, such as `(layer, position)`.

        Each label is a tuple, and `rows` and `cols` are the indices of the two parts in the tuple. Rows or columns are
        sorted if all of their labels are numbers; otherwise, they keep the order of appearance. Cells without an effect
        are NaN. StatisticsError is raised if a label lacks one of the parts, or if two labels have the same two parts.
        """
        (row_labels, col_labels), differences = self._arranged((rows, cols))
        return Grid(row_labels, col_labels, differences, self.effect_label)

    def to_xarray(self, dims: Sequence[str]) -> Any:
        """Return the effects as an `xarray.DataArray` with one named dimension per part of each label; see `grid`."""
        axes, differences = self._arranged(range(len(dims)))
        return data_array(differences.mean(axis=-1), dict(zip(dims, axes, strict=True)), self.effect_label)

    def _arranged(self, parts: Sequence[int]) -> tuple[list[tuple[Any, ...]], NDArray[np.float64]]:
        """Return the labels along each axis, and the effects with shape `(*axes, input)`.

        There is one axis for each number in `parts`. The number is the index of a part of each row's label.
        """
        if any(not isinstance(part, Integral) for part in parts):
            raise StatisticsError(
                "rows and cols must be integers, the indices of two parts of each label, as in grid(rows=0, cols=1); "
                f"got {', '.join(map(repr, parts))}. To choose a metric, pass metric='name'."
            )
        named, known, values = f"parts at indices {', '.join(map(str, parts))}", dict[Any, Any](), self.differences()
        for label in getattr(self, self._by_row[0]):
            if not isinstance(label, tuple) or not all(-len(label) <= part < len(label) for part in parts):
                raise StatisticsError(
                    f"The label {label!r} must be a tuple with {named}. Pass a dict whose keys are such tuples, as in "
                    "{(layer, position): patch}."
                )
            if (other := known.setdefault(tuple(label[part] for part in parts), label)) is not label:
                raise StatisticsError(
                    f"The labels {other!r} and {label!r} have the same {named}, so both effects belong in the same "
                    "cell. Choose parts that distinguish the labels, or use to_xarray() with all parts."
                )
        axes = [tuple(dict.fromkeys(part)) for part in zip(*known, strict=True)] or [()] * len(parts)
        axes = [tuple(sorted(axis)) if all(isinstance(part, Real) for part in axis) else axis for axis in axes]
        array = np.full((*map(len, axes), *values.shape[1:]), np.nan)
        for key, row in zip(known, values, strict=True):
            array[tuple(axis.index(part) for axis, part in zip(axes, key, strict=True))] = row
        return axes, array

    def _lines(self) -> list[dict[str, Any]]:
        return self.top(len(self)).to_records()

    def _effects(self) -> list[dict[str, Any]]:
        """Return one record per effect, for a figure."""
        return self.to_records()

    def _top(self, count: int, effect: NDArray[np.float64]) -> Self:
        """Return the `count` rows with the largest absolute effects, given each row's effect."""
        if not isinstance(count, Integral) or count < 0:
            raise StatisticsError(
                f"The first argument to top() must be the number of rows to return, at least 0; got {count!r}. To "
                "choose a metric, pass metric='name'."
            )
        return self._rows(largest_first(effect)[:count])

    def _rows(self, rows: NDArray[np.int64]) -> Self:
        """Return a result with only the rows that have the given indices."""
        picked = {name: _picked(getattr(self, name), rows) for name in self._by_row}
        return replace(self, **picked)  # type: ignore[type-var]  # a subclass is a dataclass


@dataclass(frozen=True, repr=False, eq=False)
class Grid(Records):
    """A matrix of effects, for example by layer and position. The table shows the largest absolute effects first.

    Attributes:
        rows: Label of each row.
        cols: Label of each column.
        differences: Effects with shape `(row, col, input)`, or `(row, col, 1)` if only the means over the inputs are
            known. Cells without an effect are NaN.
        effect_label: Label of the color bar in figures: the kind and unit of the effects, and the number of inputs.
    """

    rows: tuple[Any, ...]
    cols: tuple[Any, ...]
    differences: NDArray[np.float64]
    effect_label: str

    def effect(self) -> NDArray[np.float64]:
        """Return each cell's mean effect over the inputs, with shape `(row, col)`."""
        return np.asarray(self.differences.mean(axis=-1))

    def to_records(self) -> list[dict[str, Any]]:
        """Return one record per effect that is not NaN, with the keys `row`, `col` and `effect`."""
        effect = self.effect()
        at = np.argwhere(~np.isnan(effect)).tolist()
        return [{"row": self.rows[m], "col": self.cols[n], "effect": float(effect[m, n])} for m, n in at]

    def to_xarray(self, dims: tuple[str, str] = ("row", "col")) -> Any:
        """Return the effects as an `xarray.DataArray` with the given dimensions."""
        return data_array(self.effect(), dict(zip(dims, (self.rows, self.cols), strict=True)), self.effect_label)

    def plot(self, ax: Axes | None = None, *, rows: Any = None, cols: Any = None) -> Axes:
        """Plot the matrix as a heat map, on new axes if `ax` is None.

        `rows` and `cols` replace the labels in the figure, for example with tokens.
        """
        shown = (self.rows if rows is None else rows, self.cols if cols is None else cols)
        axes: Axes = imported("chanpatch.plots").heat_map(self.effect(), *shown, ax, label=self.effect_label)
        return axes

    def _lines(self) -> list[dict[str, Any]]:
        return sorted(self.to_records(), key=lambda record: -abs(record["effect"]))

    def _title(self) -> str:
        return f"{len(self.rows)} x {len(self.cols)} grid, {self.effect_label}"


def data_array(values: Any, axes: Mapping[str, Sequence[Any]], name: str) -> Any:
    """Create an `xarray.DataArray` called `name`; `axes` maps the name of each axis to the labels along that axis."""
    index = imported("pandas").Index
    coords = {axis: index(labels, tupleize_cols=False) for axis, labels in axes.items()}
    return imported("xarray").DataArray(values, coords, [*axes], name)


def largest_first(values: ArrayLike) -> NDArray[np.int64]:
    """Return the indices that sort values by decreasing absolute value; NaN comes last."""
    return np.argsort(-np.abs(np.asarray(values, dtype=np.float64)), kind="stable")


def columns(**values: Iterable[Any]) -> list[dict[str, Any]]:
    """Convert columns of equal length to records, one dict per row; numbers in arrays become Python numbers."""
    listed = [each.tolist() if isinstance(each, np.ndarray) else each for each in values.values()]
    return [dict(zip(values, row, strict=True)) for row in zip(*listed, strict=True)]


def shown_effect(name: str, record: Mapping[str, Any]) -> dict[str, str]:
    """Return a dict with a record's effect (under the key `name`) and interval (under `"joint 95%"`), as text."""
    interval = "-"
    if not np.isnan(record["low"]):
        interval = f"{record['low']:+.3g} to {record['high']:+.3g}" + " (few)" * (record["note"] == "few")
    return {name: "-" if np.isnan(record["effect"]) else f"{record['effect']:+.3g}", "joint 95%": interval}


def shown_p(p: float) -> str:
    """Format a p-value for a table: `-` for NaN, `<0.001` if `p < 0.001`, otherwise two significant digits."""
    if np.isnan(p):
        return "-"
    return "<0.001" if p < 0.001 else f"{p:.2g}"


def interval_notes(notes: Iterable[str]) -> list[str]:
    """Return lines that explain a table's withheld intervals and intervals marked `few`, given each row's note."""
    found = sorted({*map(str, notes)} - {""})
    lines = ["few: an interval over fewer than ten independent rows."] * ("few" in found)
    return lines + [f"No interval (-): {reason}." for reason in found if reason != "few"]


def _picked(values: Any, rows: NDArray[np.int64]) -> Any:
    if isinstance(values, dict):
        return {name: each[rows] for name, each in values.items()}
    return values[rows] if isinstance(values, np.ndarray) else tuple(values[row] for row in rows)


def more(hidden: int) -> list[str]:
    """Return a list with one line that states how many rows a table hides; the list is empty if `hidden` is 0."""
    return [f"... {hidden} more"] if hidden else []


def table(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a table as lines of text: a header, then one line per record.

    The columns are the keys of the first record. Floats are shown with four significant digits, NaN is shown as `-`,
    and None as an empty cell.
    """
    rows = _cells(records)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _cells(records: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return the text of each cell, by row, with the header as the first row. Without records, return an empty list."""
    return [[*records[0]], *([_cell(value) for value in record.values()] for record in records)] if records else []


def one_line(value: Any) -> str:
    """Return the text of a label or another value, with line breaks escaped."""
    return str(value).replace("\n", r"\n")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return one_line(value)
    return "-" if np.isnan(value) else f"{value:.4g}"


def imported(name: str, *, package: str | None = None) -> Any:
    """Import a module by name; raise MissingPackageError if the module's package is not installed.

    `package` is the package name for pip, if different from the first part of the module name.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = package or name.partition(".")[0]
        raise MissingPackageError(f"{package} is not installed: pip install {package}") from error


@contextmanager
def progress_bar(progress: bool | None, total: int | None, unit: str) -> Iterator[Callable[[int], object]]:
    """Yield a function that advances a progress bar over `total` units (None if the total is unknown).

    With `progress=None`, the bar appears on a terminal or in a notebook after two seconds if tqdm is installed. With
    `progress=True`, MissingPackageError is raised if tqdm is not installed.
    """
    if progress is False or (progress is None and find_spec("tqdm") is None):
        yield lambda count: None
        return
    tqdm = imported("tqdm.auto").tqdm
    # Compare names, because importing tqdm_notebook is slow.
    is_shown = progress or any(kind.__name__ == "tqdm_notebook" for kind in tqdm.__mro__)
    with tqdm(total=total, unit=unit, delay=2, disable=False if is_shown else None) as bar:
        yield bar.update
