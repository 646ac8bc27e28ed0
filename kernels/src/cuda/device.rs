//! A GPU through the driver: finds it without ever panicking, loads the module that the build script compiled, copies
//! and launches on one stream. The only file that calls cudarc. **Not run on hardware**: tests reach the answer of a
//! machine without a driver, and no further.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys::{CUdevice_attribute, CUfunction_attribute, is_culib_present};
use cudarc::driver::{CudaContext, CudaFunction, CudaSlice, CudaStream, DevicePtr, DriverError, result};
use cudarc::nvrtc::Ptx;

use super::params::THREADS;
use super::{Gpu, GpuError, Kernel};

/// Machine code for sm_80 and sm_90 and PTX for what comes later, made from `kernels/cuda/all.cu`.
static MODULE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/kernels.fatbin"));

/// Shared memory a block may have without being allowed more.
const SHARED_BYTES_DEFAULT: usize = 48 * 1024;
/// Blocks of 128 threads that a multiprocessor should hold to hide its latencies.
const BLOCKS_PER_MULTIPROCESSOR: usize = 4;
/// The kernels use tensor-core products that older devices lack.
const MAJOR_MIN: i32 = 8;

/// One GPU, one stream.
#[derive(Debug)]
pub struct Device {
    stream: Arc<CudaStream>,
    functions: Vec<CudaFunction>,
    n_multiprocessors: usize,
    /// Shared memory each function has been allowed.
    shared_bytes: Mutex<HashMap<&'static str, usize>>,
}

/// Whether there is a driver and a device that can run the kernels.
pub(super) fn probe() -> Result<(), GpuError> {
    open(0).map(drop)
}

fn unavailable(reason: impl Into<String>) -> GpuError {
    GpuError::Unavailable { reason: reason.into() }
}

fn failed(call: &'static str) -> impl Fn(DriverError) -> GpuError {
    move |error| GpuError::Driver { call, reason: error.to_string() }
}

/// The context of a device that can run the kernels.
fn open(ordinal: usize) -> Result<Arc<CudaContext>, GpuError> {
    // SAFETY: tries to open a library and closes it again. Asked first, because cudarc panics on a missing driver.
    if !unsafe { is_culib_present() } {
        return Err(unavailable("libcuda was not found; hint: install the NVIDIA driver"));
    }
    let unusable = |error: DriverError| unavailable(format!("the driver answers {error}"));
    result::init().map_err(unusable)?;
    let n_devices = CudaContext::device_count().map_err(unusable)?;
    if ordinal >= n_devices as usize {
        return Err(unavailable(format!("device {ordinal} of {n_devices}")));
    }
    let context = CudaContext::new(ordinal).map_err(unusable)?;
    let (major, minor) = context.compute_capability().map_err(unusable)?;
    if major < MAJOR_MIN {
        return Err(unavailable(format!("compute capability {major}.{minor}, the kernels need {MAJOR_MIN}.0")));
    }
    Ok(context)
}

// === impl Device ===

impl Device {
    /// Opens device `ordinal` and loads the kernels.
    ///
    /// # Errors
    /// [`GpuError::Unavailable`] as [`super::available`] says it, or what the driver refused.
    pub fn new(ordinal: usize) -> Result<Self, GpuError> {
        Self::on_stream(open(ordinal)?.new_stream().map_err(failed("open a stream"))?)
    }

    /// Loads the kernels for the device of a stream that somebody else works on too, such as candle's
    /// `CudaDevice::cuda_stream`, so that products and kernels follow one another without waiting on the host.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn on_stream(stream: Arc<CudaStream>) -> Result<Self, GpuError> {
        let context = stream.context();
        let module = context.load_module(Ptx::from_binary(MODULE.to_vec())).map_err(failed("load the kernels"))?;
        let functions = Kernel::ALL.iter().map(|kernel| module.load_function(kernel.name()));
        let functions = functions.collect::<Result<_, _>>().map_err(failed("find a kernel"))?;
        let count = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let n_multiprocessors = context.attribute(count).map_err(failed("ask for multiprocessors"))? as usize;
        Ok(Self { stream, functions, n_multiprocessors, shared_bytes: Mutex::default() })
    }

    /// The stream all work goes to, for products by another library.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// Lets a kernel have more shared memory than the default, once.
    fn allow_shared(&self, kernel: Kernel, function: &CudaFunction, bytes: usize) -> Result<(), GpuError> {
        if bytes <= SHARED_BYTES_DEFAULT {
            return Ok(());
        }
        let mut allowed = self.shared_bytes.lock().unwrap_or_else(PoisonError::into_inner);
        if allowed.get(kernel.name()).is_some_and(|&allowed| allowed >= bytes) {
            return Ok(());
        }
        let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        function.set_attribute(attribute, bytes as i32).map_err(failed("allow shared memory"))?;
        allowed.insert(kernel.name(), bytes);
        Ok(())
    }
}

impl Gpu for Device {
    type Memory = CudaSlice<u8>;

    fn allocate(&self, n_bytes: usize) -> Result<CudaSlice<u8>, GpuError> {
        self.stream.alloc_zeros(n_bytes).map_err(failed("allocate memory"))
    }

    fn write(&self, to: &mut CudaSlice<u8>, at: usize, bytes: &[u8]) -> Result<(), GpuError> {
        if bytes.is_empty() {
            return Ok(());
        }
        let mut part = to.slice_mut(at..at + bytes.len());
        self.stream.memcpy_htod(bytes, &mut part).map_err(failed("copy to the device"))
    }

    fn read(&self, from: &CudaSlice<u8>, bytes: &mut [u8]) -> Result<(), GpuError> {
        if bytes.is_empty() {
            return Ok(());
        }
        let part = from.slice(..bytes.len());
        self.stream.memcpy_dtoh(&part, bytes).map_err(failed("copy from the device"))?;
        self.stream.synchronize().map_err(failed("wait for the device"))
    }

    fn address(&self, memory: &CudaSlice<u8>) -> u64 {
        // One stream orders all work, so the guard of the access has nothing to wait for.
        memory.device_ptr(&self.stream).0
    }

    fn blocks_to_fill(&self) -> usize {
        self.n_multiprocessors * BLOCKS_PER_MULTIPROCESSOR
    }

    unsafe fn launch(
        &self,
        kernel: Kernel,
        grid: [usize; 3],
        shared_bytes: usize,
        params: *const c_void,
    ) -> Result<(), GpuError> {
        let function = &self.functions[kernel as usize];
        self.allow_shared(kernel, function, shared_bytes)?;
        self.stream.context().bind_to_thread().map_err(failed("use the device"))?;
        let [x, y, z] = grid.map(|n| n as u32);
        // SAFETY: function, stream and parameters live; what the parameters point to is the contract of this function.
        let launched = unsafe {
            result::launch_kernel(
                function.cu_function(),
                (x, y, z),
                (THREADS as u32, 1, 1),
                shared_bytes as u32,
                self.stream.cu_stream(),
                &mut [params.cast_mut()],
            )
        };
        launched.map_err(failed(kernel.name()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_driver_the_answer_is_an_error_and_no_panic() {
        match Device::new(0) {
            Ok(_) => eprintln!("SKIPPED: this machine has a GPU"),
            Err(error) => {
                assert!(matches!(error, GpuError::Unavailable { .. }), "{error:?}");
                assert!(error.to_string().starts_with("no GPU: "), "{error}");
                assert_eq!(crate::cuda::available(), Err(error));
            }
        }
    }

    #[test]
    fn the_module_holds_code_for_both_architectures_and_every_kernel() {
        for wanted in ["sm_80", "sm_90"].into_iter().chain(Kernel::ALL.map(Kernel::name)) {
            assert!(MODULE.windows(wanted.len()).any(|bytes| bytes == wanted.as_bytes()), "no {wanted} in the module");
        }
    }
}
