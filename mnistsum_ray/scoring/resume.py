"""TODO scoring.resume"""

import json
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mnistsum_ray.errors import RequestError
from mnistsum_ray.storage.location import Location


def unplanned_outputs(parts: pa.Table, committed: pa.Table) -> pa.Table:
    """What is committed that is no part of the plan."""
    return committed.filter(pc.invert(pc.is_in(committed["output"], parts["output"])))


def check_output_files(committed: pa.Table, output: Location) -> None:
    """Refuse an output folder that holds anything but whole files of predictions.

    Raises:
        RequestError: names the first.
    """
    errors = committed.filter(pc.is_valid(committed["error"]))
    if errors.num_rows:
        first = errors.slice(0, 1).to_pylist()[0]
        raise RequestError(
            f"--output {output.display}: {first['output']} {first['error']}; move it away, or choose another folder"
        )


def check_compatible(
    matched: pa.Table, strange: pa.Table, files: pa.Table, source: Location, request: str, output: Location
) -> None:
    """Refuse to put new predictions beside those of another model, of other input, or cut in another way.

    Args:
        matched: what `match_outputs` gave.
        strange: what `unplanned_outputs` gave.
        files: the input, `inputs.FILE_SCHEMA` and `footers.FOOTER_SCHEMA`.
        source: the input's root.
        request: what decides the predictions now.
        output: the folder, for the message.

    Raises:
        RequestError: says what differs, and that --overwrite starts afresh.
    """
    afresh = "--overwrite starts afresh"
    wrong = matched.filter(pc.and_(pc.is_valid(matched["its_request"]), pc.invert(matched["done"])))
    if wrong.num_rows:
        first = wrong.slice(0, 1).to_pylist()[0]
        if first["its_request"] != request:
            raise RequestError(
                f"--output {output.display}: {_difference(json.loads(first['its_request']), json.loads(request))}; {afresh}"
            )
        if any(first[name] != first[f"its_{name}"] for name in ("size", "modified", "footer")):
            raise RequestError(f"--output {output.display}: {first['name']} has changed since it was scored; {afresh}")
        raise RequestError(
            f"--output {output.display}: was begun with another --max-rows-per-file; give the same again, or {afresh}"
        )
    # The input may have moved since, or its root may be another folder now: either name tells that it is the same file.
    sources = pc.binary_join_element_wise(source.at(source.path).display, files["name"], "/")
    for column, now_named in (("name", files["name"]), ("source", sources)):
        again = strange.filter(pc.is_in(strange[column], now_named))
        if again.num_rows:
            first = again.slice(0, 1).to_pylist()[0]
            now = files.slice(pc.index(now_named, first[column]).as_py(), 1).to_pylist()[0]
            if now["error"]:
                raise RequestError(
                    f"--output {output.display}: holds predictions of {now['name']}, which now cannot be used ({now['error']}); "
                    "mend it, or take it out of the input"
                )
            if any(now[name] != first[name] for name in ("size", "modified", "footer")):
                raise RequestError(f"--output {output.display}: {now['name']} has changed since it was scored; {afresh}")
            raise RequestError(
                f"--output {output.display}: holds the rows of {now['name']} as {first['output']}, since it was begun with another "
                f"--max-rows-per-file or --input; give the same again, or {afresh}"
            )


def _difference(then: dict[str, Any], now: dict[str, Any]) -> str:
    if then["model_sha256"] != now["model_sha256"]:
        return (
            f"holds predictions of another model (SHA-256 {then['model_sha256'][:12]}…, --model has {now['model_sha256'][:12]}…)"
        )
    key = next((key for key in now if key != "int8" and then.get(key) != now[key]), "int8")
    if key == "temperature":
        return "holds predictions of the same model with other temperatures"
    if key == "int8":
        return "holds predictions of the same model quantized otherwise"
    flag = "--precision" if key == "precision" else f"--{key}-column"
    return f"was begun with {flag} {then.get(key)}, which is now {now[key]}"
