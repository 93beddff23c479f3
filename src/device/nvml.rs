//! NVIDIA's management library, where a driver brings one: memory, clocks, throttling, ECC and Xid events of the GPUs.
//!
//! Loaded by name, as nvidia-smi does; without it, or on any error, there is simply nothing to tell. Reads only.
//! Signatures and numbers are those of nvml.h (functions with a `_v2` name where nvml.h maps the plain one to it).

use std::ffi::{CStr, c_char, c_int, c_uint, c_ulonglong, c_void};
use std::path::Path;

use libloading::Library;

type Handle = *mut c_void;
const SUCCESS: c_int = 0;
/// NVML_CLOCK_SM.
const CLOCK_SM: c_int = 1;
/// NVML_TEMPERATURE_GPU.
const TEMPERATURE_GPU: c_int = 0;
/// NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC: since the driver was loaded.
const UNCORRECTED: c_int = 1;
const VOLATILE: c_int = 0;
/// nvmlClocksThrottleReasonHwSlowdown | SwThermalSlowdown | HwThermalSlowdown | HwPowerBrakeSlowdown.
const SLOWDOWN: c_ulonglong = 0x8 | 0x20 | 0x40 | 0x80;
/// nvmlEventTypeDoubleBitEccError | nvmlEventTypeXidCriticalError.
const EVENTS: c_ulonglong = 0x2 | 0x8;
const EVENT_XID: c_ulonglong = 0x8;

/// nvmlMemory_t.
#[repr(C)]
#[derive(Default)]
struct Memory {
    total: c_ulonglong,
    free: c_ulonglong,
    used: c_ulonglong,
}

/// nvmlEventData_t.
#[repr(C)]
struct EventData {
    device: Handle,
    kind: c_ulonglong,
    data: c_ulonglong,
    gpu_instance: c_uint,
    compute_instance: c_uint,
}

/// What one GPU says of itself; `None` where it does not support the question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reading {
    pub index: u32,
    pub name: String,
    /// Bytes used and in all.
    pub memory: Option<(u64, u64)>,
    /// MHz of the multiprocessors.
    pub clock: Option<u32>,
    /// °C.
    pub temperature: Option<u32>,
    /// Clocks are held down by heat or power hardware.
    pub slowed: Option<bool>,
    /// Uncorrected memory errors since the driver was loaded.
    pub ecc_uncorrected: Option<u64>,
}

/// Something a GPU reported since the last look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Report {
    /// Critical error with its Xid number.
    Xid(u64),
    /// A memory error that ECC could not correct.
    DoubleBitEcc,
}

/// The library, initialised.
#[derive(Debug)]
pub struct Nvml {
    library: Library,
    devices: Vec<Handle>,
    /// Null where events are not supported.
    events: Handle,
}

impl Nvml {
    /// The driver's library. `None`: there is none, or no GPU.
    pub fn open() -> Option<Self> {
        Self::open_at(Path::new("libnvidia-ml.so.1"))
    }

    /// A library of this name or path.
    pub fn open_at(path: &Path) -> Option<Self> {
        // SAFETY: loading the driver's own library runs its initialisers, which any CUDA program does too.
        let library = unsafe { Library::new(path) }.ok()?;
        let mut nvml = Self { library, devices: Vec::new(), events: std::ptr::null_mut() };
        let mut count: c_uint = 0;
        // SAFETY: nvml.h's signatures; the pointers are to locals that live through the calls.
        unsafe {
            let init: unsafe extern "C" fn() -> c_int = nvml.symbol(b"nvmlInit_v2\0")?;
            if init() != SUCCESS {
                return None;
            }
            let get: unsafe extern "C" fn(*mut c_uint) -> c_int = nvml.symbol(b"nvmlDeviceGetCount_v2\0")?;
            get(&raw mut count);
            let handle: unsafe extern "C" fn(c_uint, *mut Handle) -> c_int =
                nvml.symbol(b"nvmlDeviceGetHandleByIndex_v2\0")?;
            for index in 0..count {
                let mut device = std::ptr::null_mut();
                if handle(index, &raw mut device) == SUCCESS {
                    nvml.devices.push(device);
                }
            }
        }
        nvml.listen();
        (!nvml.devices.is_empty()).then_some(nvml)
    }

    /// Asks every GPU to report Xid and ECC events; where one cannot, it stays silent.
    fn listen(&mut self) {
        // SAFETY: nvml.h's signatures; the set is freed in `drop`.
        unsafe {
            let create: Option<unsafe extern "C" fn(*mut Handle) -> c_int> = self.symbol(b"nvmlEventSetCreate\0");
            let register: Option<unsafe extern "C" fn(Handle, c_ulonglong, Handle) -> c_int> =
                self.symbol(b"nvmlDeviceRegisterEvents\0");
            let (Some(create), Some(register)) = (create, register) else { return };
            let mut set = std::ptr::null_mut();
            if create(&raw mut set) != SUCCESS {
                return;
            }
            for &device in &self.devices {
                let _ = register(device, EVENTS, set);
            }
            self.events = set;
        }
    }

    /// One reading per GPU.
    pub fn read(&self) -> Vec<Reading> {
        self.devices
            .iter()
            .enumerate()
            .map(|(index, &device)| Reading {
                index: u32::try_from(index).unwrap_or(u32::MAX),
                name: self.name(device),
                memory: self.memory(device),
                clock: self.number(b"nvmlDeviceGetClockInfo\0", device, CLOCK_SM),
                temperature: self.number(b"nvmlDeviceGetTemperature\0", device, TEMPERATURE_GPU),
                slowed: self.slowed(device),
                ecc_uncorrected: self.ecc(device),
            })
            .collect()
    }

    /// What was reported since the last call: the GPU's index and what. Does not wait.
    pub fn reports(&self) -> Vec<(u32, Report)> {
        let mut found = Vec::new();
        if self.events.is_null() {
            return found;
        }
        // SAFETY: nvml.h's signature; `data` is a local that the call fills.
        unsafe {
            let wait: Option<unsafe extern "C" fn(Handle, *mut EventData, c_uint) -> c_int> =
                self.symbol(b"nvmlEventSetWait_v2\0");
            let Some(wait) = wait else { return found };
            let mut data =
                EventData { device: std::ptr::null_mut(), kind: 0, data: 0, gpu_instance: 0, compute_instance: 0 };
            // A GPU that fell off the bus reports without end: enough is enough.
            while found.len() < 64 && wait(self.events, &raw mut data, 0) == SUCCESS {
                let index = self.devices.iter().position(|&d| d == data.device).unwrap_or(0);
                let report = if data.kind == EVENT_XID { Report::Xid(data.data) } else { Report::DoubleBitEcc };
                found.push((u32::try_from(index).unwrap_or(u32::MAX), report));
            }
        }
        found
    }

    fn name(&self, device: Handle) -> String {
        // NVML_DEVICE_NAME_V2_BUFFER_SIZE.
        let mut buffer = [0 as c_char; 96];
        // SAFETY: nvml.h's signature; the buffer is as long as said, and the call ends it with NUL.
        unsafe {
            let get: Option<unsafe extern "C" fn(Handle, *mut c_char, c_uint) -> c_int> =
                self.symbol(b"nvmlDeviceGetName\0");
            match get.map(|get| get(device, buffer.as_mut_ptr(), 95)) {
                Some(SUCCESS) => CStr::from_ptr(buffer.as_ptr()).to_string_lossy().into_owned(),
                _ => "GPU".to_owned(),
            }
        }
    }

    fn memory(&self, device: Handle) -> Option<(u64, u64)> {
        let mut memory = Memory::default();
        // SAFETY: nvml.h's signature; the pointer is to a local.
        let rc = unsafe {
            let get: unsafe extern "C" fn(Handle, *mut Memory) -> c_int = self.symbol(b"nvmlDeviceGetMemoryInfo\0")?;
            get(device, &raw mut memory)
        };
        (rc == SUCCESS).then_some((memory.used, memory.total))
    }

    /// A function (device, which, out unsigned).
    fn number(&self, name: &[u8], device: Handle, which: c_int) -> Option<u32> {
        let mut value: c_uint = 0;
        // SAFETY: the two functions this is called for have this signature in nvml.h.
        let rc = unsafe {
            let get: unsafe extern "C" fn(Handle, c_int, *mut c_uint) -> c_int = self.symbol(name)?;
            get(device, which, &raw mut value)
        };
        (rc == SUCCESS).then_some(value)
    }

    fn slowed(&self, device: Handle) -> Option<bool> {
        let mut reasons: c_ulonglong = 0;
        // SAFETY: nvml.h's signature; the pointer is to a local.
        let rc = unsafe {
            let get: unsafe extern "C" fn(Handle, *mut c_ulonglong) -> c_int =
                self.symbol(b"nvmlDeviceGetCurrentClocksThrottleReasons\0")?;
            get(device, &raw mut reasons)
        };
        (rc == SUCCESS).then_some(reasons & SLOWDOWN != 0)
    }

    fn ecc(&self, device: Handle) -> Option<u64> {
        let mut count: c_ulonglong = 0;
        // SAFETY: nvml.h's signature; the pointer is to a local.
        let rc = unsafe {
            let get: unsafe extern "C" fn(Handle, c_int, c_int, *mut c_ulonglong) -> c_int =
                self.symbol(b"nvmlDeviceGetTotalEccErrors\0")?;
            get(device, UNCORRECTED, VOLATILE, &raw mut count)
        };
        (rc == SUCCESS).then_some(count)
    }

    /// # Safety
    /// `T` must be the function's type in nvml.h.
    unsafe fn symbol<T: Copy>(&self, name: &[u8]) -> Option<T> {
        // SAFETY: as the caller promises; the copy does not outlive `self`, which holds the library.
        unsafe { self.library.get::<T>(name).ok().map(|symbol| *symbol) }
    }
}

impl Drop for Nvml {
    fn drop(&mut self) {
        // SAFETY: nvml.h's signatures; the set is ours and is not used again.
        unsafe {
            if !self.events.is_null() {
                let free: Option<unsafe extern "C" fn(Handle) -> c_int> = self.symbol(b"nvmlEventSetFree\0");
                free.map(|free| free(self.events));
            }
            let shutdown: Option<unsafe extern "C" fn() -> c_int> = self.symbol(b"nvmlShutdown\0");
            shutdown.map(|shutdown| shutdown());
        }
    }
}
