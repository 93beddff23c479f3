"""What scripts/build-kernels does; see there. Standard library only, NVRTC through ctypes."""

import ctypes
import pathlib
import re
import subprocess
import sys
import tempfile

KERNELS = pathlib.Path("kernels")
PTX = KERNELS / "ptx"
RESOURCES = KERNELS / "RESOURCES.md"
# sm_75 is the oldest that the committed PTX runs on; ptxas 12.0 knows up to sm_90, Blackwell needs 13.
ARCHITECTURES = {"12.0": ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90"], "13": ["sm_75", "sm_80", "sm_90", "sm_100", "sm_120"]}
# Sources for newer cards only: the driver loads their modules where it can.
NEWER = {"mma": 80}
# fmad off: PyTorch's op chains round after every multiplication; where one rounding is meant the source says fmaf.
OPTIONS = ["--std=c++17", "--fmad=false"]


def oldest(path):
    return NEWER.get(path.stem, 75)


def architectures_of(path, named):
    return [architecture for architecture in named if int(architecture.removeprefix("sm_")) >= oldest(path)]


class Toolchain:
    def __init__(self, folder):
        nvidia = next(pathlib.Path(folder).glob("lib/python3*/site-packages/nvidia"))
        library = nvidia / "cuda_nvrtc/lib"
        self.nvrtc = ctypes.CDLL(str(library / "libnvrtc.so.12"))
        self.include = nvidia / "cuda_runtime/include"
        self.ptxas = {"12.0": nvidia / "cuda_nvcc/bin/ptxas", "13": nvidia / "cu13/bin/ptxas"}
        self.nvcc = nvidia / "cu13/bin/nvcc"

    def compile(self, source):
        """PTX text of one .cu, or an exit with NVRTC's log."""
        rtc, program = self.nvrtc, ctypes.c_void_p()
        rtc.nvrtcCreateProgram(ctypes.byref(program), source.read_bytes(), source.name.encode(), 0, None, None)
        options = [f"--gpu-architecture=compute_{oldest(source)}", *OPTIONS, f"--include-path={KERNELS}", f"--include-path={self.include}"]
        status = rtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*[o.encode() for o in options]))
        size = ctypes.c_size_t()
        rtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        rtc.nvrtcGetProgramLog(program, log)
        if status != 0:
            sys.exit(f"{source}: NVRTC error {status}\n{log.value.decode()}")
        rtc.nvrtcGetPTXSize(program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        rtc.nvrtcGetPTX(program, text)
        rtc.nvrtcDestroyProgram(ctypes.byref(program))
        return text.value


def assemble(tools, version, architecture, path):
    """[(kernel, registers, spilled bytes, shared bytes)] of one PTX file."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as out:
        command = [tools.ptxas[version], "-v", f"-arch={architecture}", path, "-o", out.name]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{path}: ptxas {version} {architecture}\n{done.stdout}{done.stderr}")
    rows = []
    for kernel, body in re.findall(r"Compiling entry function '(\w+)'(.*?)(?=Compiling entry|\Z)", done.stderr, re.S):
        spills = sum(map(int, re.findall(r"(\d+) bytes spill", body)))
        registers = int(re.search(r"Used (\d+) registers", body).group(1))
        shared = re.search(r"(\d+) bytes smem", body)
        rows.append((kernel, registers, spills, int(shared.group(1)) if shared else 0))
    return rows


def second_compiler(tools, source):
    command = [tools.nvcc, f"-arch=compute_{oldest(source)}", "--ptx", "-std=c++17", "--fmad=false", f"-I{KERNELS}"]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([*command, source, "-o", f"{folder}/out.ptx"], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{source}: nvcc 13\n{done.stdout}{done.stderr}")


def resources(report):
    """The text of RESOURCES.md: a row a kernel, a column a compiler and architecture."""
    columns = list(dict.fromkeys((version, architecture) for _, version, architecture, *_ in report))
    cells = {(kernel, version, architecture): f"{registers}" + (f" +{spills} B" if spills else "") for kernel, version, architecture, registers, _, spills in report}
    shared = {kernel: most for kernel, *_, most, _ in report}
    head = "| kernel | shared | " + " | ".join(f"{architecture} ({version})" for version, architecture in columns) + " |"
    rows = [f"| {k} | {shared[k]} B | " + " | ".join(cells.get((k, *c), "-") for c in columns) + " |" for k in dict.fromkeys(r[0] for r in report)]
    return "\n".join(
        [
            "# Registers a thread, by architecture",
            "Written by `scripts/build-kernels`: `ptxas -v` of the committed PTX (version in brackets), `+N B` where a kernel spills.",
            "",
            head,
            "|" + "---|" * (len(columns) + 2),
            *rows,
            "",
        ]
    )


def main():
    tools, arguments = Toolchain(sys.argv[1]), sys.argv[2:]
    check = "--check" in arguments
    quick = "--quick" in arguments  # write the PTX, assemble for the oldest architecture only
    sources, failures, report = sorted(KERNELS.glob("*.cu")), [], []
    PTX.mkdir(exist_ok=True)
    for source in sources:
        path, text = PTX / f"{source.stem}.ptx", tools.compile(source)
        if check and (not path.exists() or path.read_bytes() != text):
            failures.append(f"{path} is not what {source} compiles to: run scripts/build-kernels and commit")
        if not check:
            path.write_bytes(text)
    wanted = {source.stem for source in sources}
    failures += [f"{path} has no source" for path in PTX.glob("*.ptx") if path.stem not in wanted]
    for path in sorted(PTX.glob("*.ptx")):
        for version, architectures in ({"12.0": [f"sm_{oldest(path)}"]} if quick else ARCHITECTURES).items():
            for architecture in architectures_of(path, architectures):
                for kernel, registers, spills, shared in assemble(tools, version, architecture, path):
                    report.append((kernel, version, architecture, registers, shared, spills))
                    if spills:
                        failures.append(f"{kernel} spills {spills} bytes on {architecture} (ptxas {version})")
    if check:
        for source in sources:
            second_compiler(tools, source)
    text = resources(report)
    if check and (not RESOURCES.exists() or RESOURCES.read_text() != text):
        failures.append(f"{RESOURCES} is not what ptxas says: run scripts/build-kernels and commit")
    if not check and not quick:
        RESOURCES.write_text(text)
    print(f"{len(sources)} files, {len(report)} kernels assembled, {len(failures)} failures", file=sys.stderr)
    if failures:
        sys.exit("\n".join(failures))


main()
