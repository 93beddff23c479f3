//! cuBLAS, found and loaded by ourselves: eight functions, whichever of the versions 11 to 13 the user has.
//!
//! cudarc's own loader, pinned to CUDA 12.0, never tries libcublas.so.13, which current PyTorch wheels ship. Searched in
//! order: the system's loader, CUDA_HOME/CUDA_PATH, then nvidia/{cublas,cu13}/lib of the active Python environment.
//! Modes are PyTorch's defaults: TF32 off; reduced-precision reductions of half products allowed (split-K may add
//! partial sums in half), SPIKEPROBE_CUBLAS_REDUCED_PRECISION=0 turns them off, as
//! torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False does.

use std::ffi::{c_int, c_uint, c_void};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::driver::Driver;
use super::memory::Memory;
use crate::device::{Compute, DType};
use crate::{Error, Result};

type Handle = *mut c_void;
type GemmEx = unsafe extern "C" fn(
    Handle,
    c_int,
    c_int,
    c_int,
    c_int,
    c_int,
    *const c_void,
    *const c_void,
    c_int,
    c_int,
    *const c_void,
    c_int,
    c_int,
    *const c_void,
    *mut c_void,
    c_int,
    c_int,
    c_int,
    c_int,
) -> c_int;

/// CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION; CUBLAS_DEFAULT_MATH is 0.
const DISALLOW_REDUCED_PRECISION: c_uint = 16;
/// CUBLAS_COMPUTE_32F and CUBLAS_COMPUTE_32F_FAST_TF32.
const COMPUTE_32F: c_int = 68;
const COMPUTE_32F_FAST_TF32: c_int = 77;
/// CUBLAS_GEMM_DEFAULT_TENSOR_OP, as PyTorch passes it.
const ALGORITHM: c_int = 99;

/// An initialised cuBLAS on the compute stream.
#[derive(Debug)]
pub struct Cublas {
    driver: Arc<Driver>,
    handle: Handle,
    gemm: GemmEx,
    destroy: unsafe extern "C" fn(Handle) -> c_int,
    pub version: c_int,
    /// Half products may be reduced in half precision.
    pub reduced_precision: bool,
    _workspace: super::memory::Buffer,
    _library: libloading::Library,
}

// SAFETY: a cuBLAS handle may be used from any thread, by one at a time; the caller (`CudaDevice`) holds it in a mutex.
unsafe impl Send for Cublas {}

/// One product in cuBLAS's column-major terms: C [m, n] = op(A) [m, k] · op(B) [k, n] + beta·C.
#[derive(Debug)]
pub struct Gemm {
    pub transpose_a: bool,
    pub transpose_b: bool,
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub a: u64,
    pub lda: usize,
    pub b: u64,
    pub ldb: usize,
    /// Dtype of A and B.
    pub operands: DType,
    pub beta: f32,
    pub c: u64,
    pub ldc: usize,
    pub result: DType,
    pub compute: Compute,
}

impl Cublas {
    /// Loads the first cuBLAS that works with this driver.
    ///
    /// # Errors
    /// None is found; says where it was looked for.
    pub fn open(memory: &Arc<Memory>) -> Result<Self> {
        let driver = memory.driver.clone();
        driver.bind()?;
        let mut tried = Vec::new();
        for candidate in candidates(driver.version) {
            // SAFETY: loading cuBLAS runs its initialisers, which is what the user's PyTorch does too.
            match unsafe { libloading::Library::new(&candidate) } {
                Ok(library) => match Self::initialise(library, memory) {
                    Ok(cublas) => return Ok(cublas),
                    Err(e) => tried.push(format!("{}: {}", candidate.display(), e.what)),
                },
                Err(_) => tried.push(format!("{}: not found", candidate.display())),
            }
        }
        Err(Error::device(format!("there is no usable cuBLAS (looked for {})", tried.join("; "))).next(
            "activate the Python environment that has PyTorch, or pip install nvidia-cublas-cu12, or set CUDA_HOME, or use --device cpu",
        ))
    }

    fn initialise(library: libloading::Library, memory: &Arc<Memory>) -> Result<Self> {
        let driver = memory.driver.clone();
        // Hopper's kernels want 32 MiB, others PyTorch's 2·4 MiB + 8·16 KiB. Given by us, so that results do not
        // depend on what cuBLAS finds free.
        let bytes = if driver.capability.0 >= 9 { 32 << 20 } else { (4096 * 2 + 16 * 8) << 10 };
        let workspace = memory.allocate(bytes, || false)?;
        let reduced_precision = std::env::var_os("SPIKEPROBE_CUBLAS_REDUCED_PRECISION").is_none_or(|v| v != "0");
        // SAFETY: the signatures are those of cublas_api.h, unchanged from 11 to 13.
        unsafe {
            let create: unsafe extern "C" fn(*mut Handle) -> c_int = symbol(&library, "cublasCreate_v2")?;
            let destroy: unsafe extern "C" fn(Handle) -> c_int = symbol(&library, "cublasDestroy_v2")?;
            let set_stream: unsafe extern "C" fn(Handle, *mut c_void) -> c_int =
                symbol(&library, "cublasSetStream_v2")?;
            let set_mode: unsafe extern "C" fn(Handle, c_uint) -> c_int = symbol(&library, "cublasSetMathMode")?;
            let set_workspace: unsafe extern "C" fn(Handle, *mut c_void, usize) -> c_int =
                symbol(&library, "cublasSetWorkspace_v2")?;
            let get_version: unsafe extern "C" fn(Handle, *mut c_int) -> c_int =
                symbol(&library, "cublasGetVersion_v2")?;
            let gemm: GemmEx = symbol(&library, "cublasGemmEx")?;
            let (mut handle, mut version) = (std::ptr::null_mut(), 0);
            check(create(&mut handle), "cublasCreate")?;
            let mut made = Self {
                driver: driver.clone(),
                handle,
                gemm,
                destroy,
                version: 0,
                reduced_precision,
                _workspace: workspace.clone(),
                _library: library,
            };
            check(set_stream(handle, driver.compute.0.cast()), "cublasSetStream")?;
            check(set_workspace(handle, workspace.address() as *mut c_void, bytes), "cublasSetWorkspace")?;
            check(
                set_mode(handle, if reduced_precision { 0 } else { DISALLOW_REDUCED_PRECISION }),
                "cublasSetMathMode",
            )?;
            check(get_version(handle, &mut version), "cublasGetVersion")?;
            made.version = version;
            Ok(made)
        }
    }

    /// Queues a product.
    ///
    /// # Safety
    /// a, b and c address matrices of the given shapes in live buffers; c overlaps neither.
    ///
    /// # Errors
    /// A dimension beyond i32, a status from cuBLAS.
    pub unsafe fn run(&self, g: &Gemm) -> Result<()> {
        self.driver.bind()?;
        let size = |x: usize| {
            c_int::try_from(x).map_err(|_| Error::device(format!("a product's dimension {x} is beyond cuBLAS")))
        };
        let (one, beta) = (1.0f32, g.beta);
        let compute = if g.compute == Compute::Tf32 { COMPUTE_32F_FAST_TF32 } else { COMPUTE_32F };
        // SAFETY: the caller's promise; scalars live on the host (the default pointer mode).
        let status = unsafe {
            (self.gemm)(
                self.handle,
                c_int::from(g.transpose_a),
                c_int::from(g.transpose_b),
                size(g.m)?,
                size(g.n)?,
                size(g.k)?,
                (&raw const one).cast(),
                g.a as *const c_void,
                cuda_type(g.operands),
                size(g.lda)?,
                g.b as *const c_void,
                cuda_type(g.operands),
                size(g.ldb)?,
                (&raw const beta).cast(),
                g.c as *mut c_void,
                cuda_type(g.result),
                size(g.ldc)?,
                compute,
                ALGORITHM,
            )
        };
        check(status, &format!("cublasGemmEx [{}, {}] x [{}, {}]", g.m, g.k, g.k, g.n))
    }
}

impl Drop for Cublas {
    fn drop(&mut self) {
        if self.driver.bind().is_ok() && !self.handle.is_null() {
            // SAFETY: made by cublasCreate, destroyed once.
            let _ = unsafe { (self.destroy)(self.handle) };
        }
    }
}

/// CUDA_R_32F, CUDA_R_16BF, CUDA_R_16F.
fn cuda_type(dtype: DType) -> c_int {
    match dtype {
        DType::F32 => 0,
        DType::BF16 => 14,
        DType::F16 => 2,
    }
}

fn check(status: c_int, doing: &str) -> Result<()> {
    if status == 0 {
        return Ok(());
    }
    let name = match status {
        1 => "not initialised (is this cuBLAS newer than the driver?)",
        3 => "out of GPU memory",
        7 => "invalid value",
        8 => "the GPU's architecture is not supported",
        11 => "access to GPU memory failed",
        13 => "execution failed",
        15 => "not supported",
        _ => "unknown status",
    };
    Err(Error::device(format!("{doing}: {name} ({status})")).at("cuBLAS").next("run again with --device cpu"))
}

/// # Safety
/// T is the symbol's type.
unsafe fn symbol<T: Copy>(library: &libloading::Library, name: &str) -> Result<T> {
    // SAFETY: the caller's promise.
    unsafe { library.get::<T>(name.as_bytes()) }.map(|s| *s).map_err(|_| Error::device(format!("has no {name}")))
}

/// Names and paths to try, best first. Version 13 needs a CUDA 13 driver.
fn candidates(driver: i32) -> Vec<PathBuf> {
    let versions: Vec<u32> = [13, 12, 11].into_iter().filter(|v| *v < 13 || driver >= 13_000).collect();
    let names: Vec<String> = versions.iter().map(|v| format!("libcublas.so.{v}")).collect();
    let mut paths: Vec<PathBuf> = names.iter().map(PathBuf::from).collect();
    let mut folders: Vec<PathBuf> = ["CUDA_HOME", "CUDA_PATH"]
        .iter()
        .filter_map(std::env::var_os)
        .flat_map(|home| [Path::new(&home).join("lib64"), Path::new(&home).join("lib")])
        .collect();
    folders.push(PathBuf::from("/usr/local/cuda/lib64"));
    folders.extend(python_folders());
    for folder in folders {
        paths.extend(names.iter().map(|name| folder.join(name)).filter(|path| path.exists()));
    }
    paths
}

/// nvidia/{cublas,cu13}/lib below the site-packages of the active environment: VIRTUAL_ENV, CONDA_PREFIX, and the prefix of
/// the first python3 on PATH.
fn python_folders() -> Vec<PathBuf> {
    let mut prefixes: Vec<PathBuf> =
        ["VIRTUAL_ENV", "CONDA_PREFIX"].iter().filter_map(std::env::var_os).map(PathBuf::from).collect();
    let path = std::env::var_os("PATH").unwrap_or_default();
    let first = std::env::split_paths(&path).find(|folder| folder.join("python3").exists());
    prefixes.extend(first.and_then(|bin| bin.parent().map(Path::to_path_buf)));
    let mut found = Vec::new();
    for library in prefixes.iter().map(|prefix| prefix.join("lib")) {
        let Ok(entries) = std::fs::read_dir(&library) else { continue };
        let mut pythons: Vec<PathBuf> = entries
            .filter_map(|entry| entry.ok().map(|e| e.path()))
            .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("python3")))
            .collect();
        pythons.sort();
        for site in pythons.iter().flat_map(|python| [python.join("site-packages"), python.join("dist-packages")]) {
            found.extend(["cu13/lib", "cublas/lib"].map(|folder| site.join("nvidia").join(folder)));
        }
    }
    found
}
