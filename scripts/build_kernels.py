"""What scripts/build-kernels does; see there. Standard library only, NVRTC through ctypes."""

import ctypes
import pathlib
import re
import subprocess
import sys
import tempfile

KERNELS = pathlib.Path("kernels")
PTX = KERNELS / "ptx"
# sm_75 is the oldest that the committed PTX runs on; ptxas 12.0 knows up to sm_90, Blackwell needs 13.
ARCHITECTURES = {"12.0": ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90"], "13": ["sm_75", "sm_80", "sm_90", "sm_100", "sm_120"]}
# fmad off: PyTorch's op chains round after every multiplication; where one rounding is meant the source says fmaf.
OPTIONS = ["--gpu-architecture=compute_75", "--std=c++17", "--fmad=false"]


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
        options = [*OPTIONS, f"--include-path={KERNELS}", f"--include-path={self.include}"]
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
    command = [tools.nvcc, "-arch=compute_75", "--ptx", "-std=c++17", "--fmad=false", f"-I{KERNELS}"]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([*command, source, "-o", f"{folder}/out.ptx"], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{source}: nvcc 13\n{done.stdout}{done.stderr}")


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
        for version, architectures in ({"12.0": ["sm_75"]} if quick else ARCHITECTURES).items():
            for architecture in architectures:
                for kernel, registers, spills, shared in assemble(tools, version, architecture, path):
                    report.append(f"{kernel:32} {architecture:7} ptxas {version:5} {registers:4} registers {shared:6} B shared {spills:4} B spilled")
                    if spills:
                        failures.append(f"{kernel} spills {spills} bytes on {architecture} (ptxas {version})")
    if check:
        for source in sources:
            second_compiler(tools, source)
    text = "\n".join(report) + "\n"
    if "--report" in arguments:
        pathlib.Path(arguments[arguments.index("--report") + 1]).write_text(text)
    else:
        print(text, end="")
    print(f"{len(sources)} files, {len(report)} kernels assembled, {len(failures)} failures", file=sys.stderr)
    if failures:
        sys.exit("\n".join(failures))


main()
