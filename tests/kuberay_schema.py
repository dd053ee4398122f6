"""Writes kuberay_schema.json: what KubeRay's CRD says of the fields that .deploy/rayjob.yaml uses.

    python -m tests.kuberay_schema https://raw.githubusercontent.com/ray-project/kuberay/v1.7.0/ray-operator/config/crd/bases

The CRD is 1 MB (Apache License 2.0). Each object that the file contains keeps the names of all its fields and takes no others;
the schemas of fields that the file does not use are left out. Run it again when it uses a new field, to check its value too.
"""

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any, Final

import yaml

DEPLOY: Final = Path(__file__).parents[1] / ".deploy"
SCHEMA: Final = Path(__file__).with_suffix(".json")
_KEPT: Final = ("type", "enum", "pattern", "anyOf", "minimum", "minLength", "required", "additionalProperties")


def reduced(schema: dict[str, Any], values: list[Any]) -> dict[str, Any]:
    """The schema of these values, without that of the fields that none of them has."""
    kept: dict[str, Any] = {key: schema[key] for key in _KEPT if key in schema}
    if "properties" in schema:
        kept["additionalProperties"] = False
        kept["properties"] = {
            name: reduced(field, used) if (used := [value[name] for value in values if name in value]) else {}
            for name, field in schema["properties"].items()
        }
    if "items" in schema:
        kept["items"] = reduced(schema["items"], [item for value in values for item in value])
    return kept


def main(folder: str) -> None:
    """Args: the URI of the folder with the CRDs."""
    with urllib.request.urlopen(f"{folder}/ray.io_rayjobs.yaml") as answer:
        crd = yaml.load(answer, yaml.CSafeLoader)
    versions = {version["name"]: version["schema"]["openAPIV3Schema"] for version in crd["spec"]["versions"]}
    document = yaml.safe_load((DEPLOY / "rayjob.yaml").read_text())
    schema = reduced(versions[document["apiVersion"].removeprefix("ray.io/")], [document])
    SCHEMA.write_text(json.dumps({"source": folder, "licence": "Apache-2.0", "rayjob": schema}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
