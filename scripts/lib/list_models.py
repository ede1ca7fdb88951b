#!/usr/bin/env python3
"""Print what scripts/download-models.sh has to fetch: one line an entry, name, repository, revision, tab-separated.

list_models.py models.yaml [NAME...]
"""

import pathlib
import sys

import yaml


def main(config: str, names: list[str]) -> None:
    models = (yaml.safe_load(pathlib.Path(config).read_text()) or {}).get("models") or {}
    unknown = [name for name in names if name not in models]
    if unknown:
        raise SystemExit(f"error: {config} has no model {', '.join(unknown)}; there are: {', '.join(models)}")
    for name in names or models:
        entry = models[name] or {}
        repo = str(entry.get("model") or "")
        is_folder = repo.startswith((".", "/", "~")) or (pathlib.Path(config).parent / repo).is_dir()
        if repo.count("/") == 1 and not is_folder:
            print(name, repo, entry.get("revision") or "main", sep="\t")
        elif names:
            raise SystemExit(f"error: {name} has no weights to fetch (model: {repo or 'not set'})")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    main(sys.argv[1], sys.argv[2:])
