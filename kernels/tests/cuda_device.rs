//! The cases of `cuda.rs` on a GPU, through the driver: the same parity with the scalar reference, on hardware. Each case is
//! skipped with a line that says so where there is no driver or device.

mod cuda {
    pub(super) mod attention;
    pub(super) mod layer;
    pub(super) mod lora;
    pub(super) mod matmul;
    pub(super) mod rows;
    pub(super) mod support;
}

/// What the cases run on: the first device, which all of them share.
mod executor {
    use std::ffi::c_void;
    use std::sync::OnceLock;

    use kernels::cuda::device::Device;
    use kernels::cuda::{Gpu, GpuError, Kernel};

    /// The device, with a say in how finely work is cut.
    #[derive(Debug, Clone, Copy)]
    pub(crate) struct Executor {
        blocks_to_fill: usize,
    }

    /// Whole tiles.
    pub(crate) const PLAIN: Executor = Executor { blocks_to_fill: 0 };
    /// Cuts work into as many blocks as it can.
    pub(crate) const CUT: Executor = Executor { blocks_to_fill: usize::MAX };

    fn device() -> &'static Result<Device, GpuError> {
        static DEVICE: OnceLock<Result<Device, GpuError>> = OnceLock::new();
        DEVICE.get_or_init(|| Device::new(0))
    }

    fn present() -> &'static Device {
        device().as_ref().expect("a case begins by asking whether there is a device")
    }

    /// Whether there is no device; says so.
    pub(crate) fn absent() -> bool {
        device().as_ref().inspect_err(|error| eprintln!("SKIPPED: {error}")).is_err()
    }

    impl Gpu for Executor {
        type Memory = <Device as Gpu>::Memory;
        type Host = <Device as Gpu>::Host;

        fn allocate(&self, n_bytes: usize) -> Result<Self::Memory, GpuError> {
            present().allocate(n_bytes)
        }

        fn allocate_host(&self, len: usize) -> Result<Self::Host, GpuError> {
            present().allocate_host(len)
        }

        fn write(&self, to: &mut Self::Memory, at: usize, bytes: &[u8]) -> Result<(), GpuError> {
            present().write(to, at, bytes)
        }

        fn fill(&self, memory: &mut Self::Memory, at: usize, n_bytes: usize, byte: u8) -> Result<(), GpuError> {
            present().fill(memory, at, n_bytes, byte)
        }

        fn read(&self, from: &Self::Memory, bytes: &mut [u8]) -> Result<(), GpuError> {
            present().read(from, bytes)
        }

        fn address(&self, memory: &Self::Memory) -> u64 {
            present().address(memory)
        }

        fn blocks_to_fill(&self) -> usize {
            self.blocks_to_fill
        }

        unsafe fn launch(
            &self,
            kernel: Kernel,
            grid: [usize; 3],
            shared_bytes: usize,
            params: *const c_void,
        ) -> Result<(), GpuError> {
            // SAFETY: the contract is the same.
            unsafe { present().launch(kernel, grid, shared_bytes, params) }
        }
    }
}
