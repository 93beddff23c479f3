//! The CUDA driver behind `Result`: which calls we make, on which context, and what their failures say.
//!
//! Owns the context, the two streams (compute, weight copies) and events. Raw calls come from cudarc's dynamic loader,
//! which panics when the library is missing; [`Driver::open`] therefore asks first.

use std::ffi::{CStr, c_void};

use cudarc::driver::sys;

use crate::{Error, Result};

/// Oldest driver that reads PTX ISA 8.0 (CUDA 12.0, driver 525).
const OLDEST_DRIVER: i32 = 12_000;
/// Oldest compute capability the committed PTX runs on (Turing).
const OLDEST_CAPABILITY: (i32, i32) = (7, 5);

/// An initialised device: its primary context and two streams on it.
#[derive(Debug)]
pub struct Driver {
    pub ordinal: usize,
    pub name: String,
    pub capability: (i32, i32),
    /// CUDA version of the driver, 1000·major + 10·minor.
    pub version: i32,
    pub multiprocessors: u32,
    device: sys::CUdevice,
    context: sys::CUcontext,
    pub compute: Stream,
    pub copies: Stream,
}

// SAFETY: a CUDA context and its streams may be used from any thread that has made the context current, which `bind`
// does before every call; the driver's own calls are thread-safe.
unsafe impl Send for Driver {}
// SAFETY: as above.
unsafe impl Sync for Driver {}

/// A queue of work on the device; destroyed by [`Driver`].
#[derive(Debug, Clone, Copy)]
pub struct Stream(pub(super) sys::CUstream);

/// A point in a stream.
#[derive(Debug)]
pub struct Event(sys::CUevent);

// SAFETY: events are plain handles; the driver's calls on them are thread-safe.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made by cuEventCreate, destroyed once. A failure at shutdown has nobody to tell.
        let _ = unsafe { sys::cuEventDestroy_v2(self.0) };
    }
}

/// An error of a driver call, for people.
pub fn check(status: sys::CUresult, doing: &str) -> Result<()> {
    if status == sys::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut text: *const std::ffi::c_char = std::ptr::null();
    // SAFETY: the driver writes a pointer to a static string, or leaves null.
    let name = unsafe {
        let _ = sys::cuGetErrorName(status, &mut text);
        if text.is_null() { format!("{status:?}") } else { CStr::from_ptr(text).to_string_lossy().into_owned() }
    };
    Err(Error::device(format!("{doing}: {name}"))
        .at("CUDA")
        .next("run again with --device cpu; if it happens again, scripts/gpu-check tells a broken card from a bug"))
}

impl Driver {
    /// Opens device `ordinal`.
    ///
    /// # Errors
    /// No driver, a driver older than 525, no such device, compute capability below 7.5.
    pub fn open(ordinal: usize) -> Result<Self> {
        let on_cpu = "or use --device cpu";
        // SAFETY: loads the driver library if there is one; no call into it.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::device("there is no NVIDIA driver: libcuda.so.1 cannot be loaded")
                .next(format!("install the NVIDIA driver (525 or newer), {on_cpu}")));
        }
        let mut version = 0;
        // SAFETY: the out-pointer is valid; this call is allowed before cuInit.
        check(unsafe { sys::cuDriverGetVersion(&mut version) }, "asking the driver's version")?;
        if version < OLDEST_DRIVER {
            let (major, minor) = (version / 1000, version % 1000 / 10);
            return Err(Error::device(format!(
                "the NVIDIA driver is too old: it knows CUDA {major}.{minor}, 12.0 is needed"
            ))
            .next(format!("update the driver to 525 or newer, {on_cpu}")));
        }
        let mut count = 0;
        // SAFETY: the out-pointer is valid.
        let found = unsafe {
            if sys::cuInit(0) == sys::CUresult::CUDA_SUCCESS {
                sys::cuDeviceGetCount(&mut count)
            } else {
                sys::CUresult::CUDA_ERROR_NO_DEVICE
            }
        };
        if found != sys::CUresult::CUDA_SUCCESS || count == 0 {
            return Err(Error::device("the NVIDIA driver finds no GPU")
                .next(format!("check nvidia-smi and CUDA_VISIBLE_DEVICES, {on_cpu}")));
        }
        if ordinal >= count as usize {
            return Err(Error::device(format!(
                "there is no cuda:{ordinal}: the driver finds {count} GPU(s), cuda:0 to cuda:{}",
                count - 1
            ))
            .next("choose one of those"));
        }
        Self::open_found(ordinal, version)
    }

    fn open_found(ordinal: usize, version: i32) -> Result<Self> {
        let mut device = 0;
        let mut name = [0 as std::ffi::c_char; 256];
        // SAFETY: the out-pointers are valid, the name's length is passed.
        let name = unsafe {
            check(sys::cuDeviceGet(&mut device, ordinal as i32), "opening the GPU")?;
            check(sys::cuDeviceGetName(name.as_mut_ptr(), 255, device), "asking the GPU's name")?;
            CStr::from_ptr(name.as_ptr()).to_string_lossy().into_owned()
        };
        let attribute = |which: sys::CUdevice_attribute| {
            let mut value = 0;
            // SAFETY: the out-pointer is valid, the device was found above.
            check(unsafe { sys::cuDeviceGetAttribute(&mut value, which, device) }, "asking what the GPU can do")?;
            Ok::<i32, Error>(value)
        };
        use sys::CUdevice_attribute_enum as Attribute;
        let capability = (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        if capability < OLDEST_CAPABILITY {
            return Err(Error::device(format!(
                "{name} has compute capability {}.{}; 7.5 (Turing, 2018) or newer is needed",
                capability.0, capability.1
            ))
            .next("use another GPU, or --device cpu"));
        }
        let multiprocessors = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?.max(1) as u32;
        let mut context = std::ptr::null_mut();
        // SAFETY: valid out-pointers; the primary context is released once, in drop.
        unsafe {
            check(sys::cuDevicePrimaryCtxRetain(&mut context, device), "making a context on the GPU")?;
            check(sys::cuCtxSetCurrent(context), "taking the GPU's context")?;
        }
        let stream = || {
            let mut stream = std::ptr::null_mut();
            // 1 = CU_STREAM_NON_BLOCKING: no hidden order with the legacy default stream.
            // SAFETY: valid out-pointer; destroyed in drop.
            check(unsafe { sys::cuStreamCreate(&mut stream, 1) }, "making a stream")?;
            Ok::<Stream, Error>(Stream(stream))
        };
        let (compute, copies) = (stream()?, stream()?);
        Ok(Self { ordinal, name, capability, version, multiprocessors, device, context, compute, copies })
    }

    /// Makes the context current on this thread.
    pub fn bind(&self) -> Result<()> {
        // SAFETY: the context lives as long as self.
        check(unsafe { sys::cuCtxSetCurrent(self.context) }, "taking the GPU's context")
    }

    /// Device memory, uninitialised; `None` if there is not enough.
    pub fn allocate(&self, bytes: usize) -> Result<Option<u64>> {
        self.bind()?;
        let mut address = 0;
        // SAFETY: valid out-pointer; the memory is freed by `free`.
        match unsafe { sys::cuMemAlloc_v2(&mut address, bytes.max(1)) } {
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => Ok(None),
            status => check(status, "allocating GPU memory").map(|()| Some(address)),
        }
    }
    /// Frees memory of `allocate`, after all work on it (the driver waits).
    pub fn free(&self, address: u64) {
        // SAFETY: callers own the address and give it up here. A failure means a lost context: nothing left to free.
        let _ = self.bind().map(|()| unsafe { sys::cuMemFree_v2(address) });
    }
    /// (free, total) bytes.
    pub fn memory(&self) -> Result<(usize, usize)> {
        self.bind()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: valid out-pointers.
        check(unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) }, "asking for free GPU memory")?;
        Ok((free, total))
    }
    /// Page-locked host memory.
    pub fn allocate_host(&self, bytes: usize) -> Result<*mut u8> {
        self.bind()?;
        let mut address: *mut c_void = std::ptr::null_mut();
        // SAFETY: valid out-pointer; freed by `free_host`.
        check(unsafe { sys::cuMemHostAlloc(&mut address, bytes, 0) }, "allocating page-locked memory")?;
        Ok(address.cast())
    }
    pub fn free_host(&self, address: *mut u8) {
        // SAFETY: made by `allocate_host`, given up by its one owner.
        let _ = self.bind().map(|()| unsafe { sys::cuMemFreeHost(address.cast()) });
    }

    /// Queues a copy to the device.
    ///
    /// # Safety
    /// `to..to+bytes` lies in one live allocation; `from` is page-locked, `bytes` long, and stays unchanged until an
    /// event recorded after this call has passed.
    pub unsafe fn copy_to_device(&self, to: u64, from: *const u8, bytes: usize, stream: Stream) -> Result<()> {
        self.bind()?;
        // SAFETY: the caller's promise.
        check(unsafe { sys::cuMemcpyHtoDAsync_v2(to, from.cast(), bytes, stream.0) }, "copying to the GPU")
    }
    /// Queues a copy to the host.
    ///
    /// # Safety
    /// As [`Self::copy_to_device`], with the roles exchanged; `to` must not be read before the stream was synchronised.
    pub unsafe fn copy_to_host(&self, to: *mut u8, from: u64, bytes: usize, stream: Stream) -> Result<()> {
        self.bind()?;
        // SAFETY: the caller's promise.
        check(unsafe { sys::cuMemcpyDtoHAsync_v2(to.cast(), from, bytes, stream.0) }, "copying from the GPU")
    }
    /// Queues a copy within the device.
    ///
    /// # Safety
    /// Both ranges lie in live allocations and do not overlap.
    pub unsafe fn copy_on_device(&self, to: u64, from: u64, bytes: usize) -> Result<()> {
        self.bind()?;
        // SAFETY: the caller's promise.
        check(unsafe { sys::cuMemcpyDtoDAsync_v2(to, from, bytes, self.compute.0) }, "copying on the GPU")
    }
    /// Queues filling with zero bytes.
    ///
    /// # Safety
    /// The range lies in one live allocation.
    pub unsafe fn zero(&self, at: u64, bytes: usize) -> Result<()> {
        self.bind()?;
        // SAFETY: the caller's promise.
        check(unsafe { sys::cuMemsetD8Async(at, 0, bytes, self.compute.0) }, "clearing GPU memory")
    }

    /// Waits for all work of the stream; failures of earlier kernels surface here.
    pub fn synchronize(&self, stream: Stream) -> Result<()> {
        self.bind()?;
        // SAFETY: the stream lives as long as self.
        check(unsafe { sys::cuStreamSynchronize(stream.0) }, "waiting for the GPU")
    }
    pub fn event(&self) -> Result<Event> {
        self.bind()?;
        let mut event = std::ptr::null_mut();
        // 2 = CU_EVENT_DISABLE_TIMING: cheaper.
        // SAFETY: valid out-pointer; destroyed by Event's drop.
        check(unsafe { sys::cuEventCreate(&mut event, 2) }, "making an event")?;
        Ok(Event(event))
    }
    /// The event now stands for everything queued so far in the stream.
    pub fn record(&self, event: &Event, stream: Stream) -> Result<()> {
        self.bind()?;
        // SAFETY: both handles are live.
        check(unsafe { sys::cuEventRecord(event.0, stream.0) }, "recording an event")
    }
    /// The host waits for the event.
    pub fn wait(&self, event: &Event) -> Result<()> {
        self.bind()?;
        // SAFETY: the handle is live.
        check(unsafe { sys::cuEventSynchronize(event.0) }, "waiting for an event")
    }
    /// Later work of the stream waits for the event.
    pub fn order(&self, stream: Stream, after: &Event) -> Result<()> {
        self.bind()?;
        // SAFETY: both handles are live.
        check(unsafe { sys::cuStreamWaitEvent(stream.0, after.0, 0) }, "ordering streams")
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        if self.bind().is_err() {
            return;
        }
        // SAFETY: made in `open_found`, destroyed once; owners of memory and modules hold an Arc of us and are gone.
        // Failures at shutdown have nobody to tell.
        unsafe {
            let _ = sys::cuStreamSynchronize(self.compute.0);
            let _ = sys::cuStreamDestroy_v2(self.compute.0);
            let _ = sys::cuStreamDestroy_v2(self.copies.0);
            let _ = sys::cuDevicePrimaryCtxRelease_v2(self.device);
        }
    }
}
