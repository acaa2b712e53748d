"""DumpIR: write the module as TVMScript between two phases, to be opened and read."""

from pathlib import Path

import tvm


def dump_ir(directory: Path, name: str) -> tvm.transform.Pass:
    """`directory/<name>.py`; constants and metadata are left out."""

    @tvm.transform.module_pass(opt_level=0, name="DumpIR")
    def run(mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"{name}.py").write_text(mod.script(show_meta=False) + "\n", encoding="utf-8")
        return mod

    return run
