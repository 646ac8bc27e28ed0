//! A GPU through the driver: finds it without ever panicking, loads the module that the build script compiled, copies
//! and launches on one stream. The only file that calls cudarc. Without a driver its tests reach the answer that there is
//! none, and no further.

use std::collections::HashMap;
use std::ffi::c_void;
use std::ops::{Deref, DerefMut};
use std::ptr::null_mut;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cudarc::driver::sys::{
    CUdevice_attribute, CUevent_flags, CUfunction_attribute, CUgraphInstantiate_flags, CUlaunchAttribute,
    CUlaunchAttributeID, CUlaunchAttributeValue, CUlaunchConfig, CUstreamCaptureMode, cuLaunchKernelEx,
    is_culib_present,
};
use cudarc::driver::{
    CudaContext, CudaFunction, CudaSlice, CudaStream, DevicePtr, DriverError, PinnedHostSlice, result,
};
use cudarc::nvrtc::Ptx;

use super::{Gpu, GpuError, Kernel};

/// Machine code for sm_80 and sm_90 and PTX for what comes later, made from `kernels/cuda/all.cu`.
static MODULE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/kernels.fatbin"));

/// Shared memory a block may have without being allowed more.
const SHARED_BYTES_DEFAULT: usize = 48 * 1024;
/// Blocks of 128 threads that a multiprocessor should hold to hide its latencies.
const BLOCKS_PER_MULTIPROCESSOR: usize = 8;
/// The kernels use tensor-core products that older devices lack.
const MAJOR_MIN: i32 = 8;

/// Devices from this on can start a kernel while the one before ends.
const EARLY_MAJOR_MIN: i32 = 9;

/// One GPU, one stream.
#[derive(Debug)]
pub struct Device {
    stream: Arc<CudaStream>,
    functions: Vec<CudaFunction>,
    n_multiprocessors: usize,
    /// Kernels may be started before the one before has ended (sm_90).
    starts_early: bool,
    /// Shared memory each function has been allowed.
    shared_bytes: Mutex<HashMap<&'static str, usize>>,
}

/// Memory of the host that stays in place, so that the device writes it without a copy in between.
#[derive(Debug)]
pub struct Pinned {
    slice: PinnedHostSlice<f32>,
    len: usize,
}

impl Deref for Pinned {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.slice.as_slice().expect("no copy into it is ever left unfinished")[..self.len]
    }
}

impl DerefMut for Pinned {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.slice.as_mut_slice().expect("no copy into it is ever left unfinished")[..self.len]
    }
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
        let context = open(ordinal)?;
        // SAFETY: all memory made here is used on the one stream opened below, which orders its work and its end. Without
        // this every address that is asked for costs two calls of the driver.
        unsafe { context.disable_event_tracking() };
        Self::on_stream(context.new_stream().map_err(failed("open a stream"))?)
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
        let (major, _) = context.compute_capability().map_err(failed("ask for the capability"))?;
        let starts_early = major >= EARLY_MAJOR_MIN;
        Ok(Self { stream, functions, n_multiprocessors, starts_early, shared_bytes: Mutex::default() })
    }

    /// The stream all work goes to, for products by another library.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// Name, memory and driver, for reports.
    pub fn describe(&self) -> String {
        let context = self.stream.context();
        let name = context.name().unwrap_or_else(|error| format!("a device without a name ({error})"));
        let (major, minor) = context.compute_capability().unwrap_or((0, 0));
        format!("{name}, sm_{major}{minor}, {} multiprocessors", self.n_multiprocessors)
    }

    /// Waits for all work before.
    ///
    /// # Errors
    /// When work before this failed.
    pub fn wait(&self) -> Result<(), GpuError> {
        self.stream.synchronize().map_err(failed("wait for the device"))
    }

    /// How long the kernels that `work` launches take: recorded as a graph, so that the host's part of a launch is not in
    /// it, and timed by events; the median of `n_samples` replays after one more. `work` must not allocate or copy.
    ///
    /// # Errors
    /// What `work` returns, or what the driver refuses.
    pub fn time(&self, n_samples: usize, work: impl FnOnce() -> Result<(), GpuError>) -> Result<Duration, GpuError> {
        let refused = failed("time kernels");
        self.wait()?;
        self.stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED).map_err(&refused)?;
        let worked = work();
        let graph = self.stream.end_capture(CUgraphInstantiate_flags(0)).map_err(&refused)?;
        worked?;
        let graph =
            graph.ok_or_else(|| GpuError::Driver { call: "time kernels", reason: "nothing was launched".into() })?;
        let event = || self.stream.context().new_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).map_err(&refused);
        let (start, end) = (event()?, event()?);
        let mut samples = Vec::with_capacity(n_samples);
        for sample in 0..=n_samples {
            start.record(&self.stream).map_err(&refused)?;
            graph.launch().map_err(&refused)?;
            end.record(&self.stream).map_err(&refused)?;
            let ms = start.elapsed_ms(&end).map_err(&refused)?;
            if sample > 0 {
                samples.push(ms);
            }
        }
        samples.sort_by(f32::total_cmp);
        Ok(Duration::from_secs_f32(samples[n_samples / 2] / 1e3))
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
    type Host = Pinned;

    fn allocate(&self, n_bytes: usize) -> Result<CudaSlice<u8>, GpuError> {
        self.stream.alloc_zeros(n_bytes).map_err(failed("allocate memory"))
    }

    fn allocate_host(&self, len: usize) -> Result<Pinned, GpuError> {
        let refused = failed("allocate memory of the host");
        // SAFETY: every value is written below before anybody can read it.
        let mut slice =
            unsafe { self.stream.context().alloc_pinned_with_flags::<f32>(len.max(1), 0) }.map_err(&refused)?;
        slice.as_mut_slice().map_err(&refused)?.fill(0.0);
        Ok(Pinned { slice, len })
    }

    fn write(&self, to: &mut CudaSlice<u8>, at: usize, bytes: &[u8]) -> Result<(), GpuError> {
        if bytes.is_empty() {
            return Ok(());
        }
        let mut part = to.slice_mut(at..at + bytes.len());
        self.stream.memcpy_htod(bytes, &mut part).map_err(failed("copy to the device"))
    }

    fn fill(&self, memory: &mut CudaSlice<u8>, at: usize, n_bytes: usize, byte: u8) -> Result<(), GpuError> {
        if n_bytes == 0 {
            return Ok(());
        }
        assert!(at.checked_add(n_bytes).is_some_and(|end| end <= memory.len()), "bytes from {at} on beyond the end");
        self.stream.context().bind_to_thread().map_err(failed("use the device"))?;
        // SAFETY: the bytes lie within the memory, which lives until work on its stream has ended.
        unsafe { result::memset_d8_async(self.address(memory) + at as u64, byte, n_bytes, self.stream.cu_stream()) }
            .map_err(failed("fill memory"))
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
        // The kernel may be started while the one before it ends: every kernel waits for that itself.
        let mut early = CUlaunchAttribute {
            id: CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: kernel.threads() as u32,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shared_bytes as u32,
            hStream: self.stream.cu_stream(),
            attrs: &raw mut early,
            numAttrs: u32::from(self.starts_early),
        };
        let mut params = [params.cast_mut()];
        // SAFETY: function, stream and parameters live; what the parameters point to is the contract of this function.
        let launched =
            unsafe { cuLaunchKernelEx(&raw const config, function.cu_function(), params.as_mut_ptr(), null_mut()) }
                .result();
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
