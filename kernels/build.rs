//! Compiles `cuda/*.cu`: with nvcc into one module of machine code for feature `cuda`, and with the C++ compiler into
//! the emulation for feature `cuda-emulation`. Does nothing without them; downloads nothing.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=cuda");
    #[cfg(feature = "cuda")]
    module::compile();
    #[cfg(feature = "cuda-emulation")]
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .opt_level(2)
        .flag("-ffp-contract=off")
        .flag("-Wno-unknown-pragmas")
        .file("cuda/emulation.cpp")
        .compile("tenantry_cuda_emulation");
}

#[cfg(feature = "cuda")]
mod module {
    use std::env;
    use std::path::{Path, PathBuf};
    use std::process::Command;

    /// Writes `kernels.fatbin`: machine code for sm_80 (A100; also runs on sm_86 and sm_89, so RTX 30 and 40) and sm_90
    /// (H100), and PTX that the driver translates for later devices.
    pub(super) fn compile() {
        let nvcc = find_nvcc();
        let target = Path::new(&env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("kernels.fatbin");
        let status = Command::new(&nvcc)
            .args(["-std=c++17", "-O3", "-fmad=false", "--fatbin", "--Werror=all-warnings"])
            .args(["-gencode=arch=compute_80,code=[sm_80,compute_80]", "-gencode=arch=compute_90,code=sm_90"])
            .arg("cuda/all.cu")
            .arg("-o")
            .arg(target)
            .status();
        assert!(status.is_ok_and(|status| status.success()), "{} failed on cuda/all.cu", nvcc.display());
    }

    /// In this order: CUDA_HOME, what `scripts/cuda-toolkit` assembled, the PATH.
    fn find_nvcc() -> PathBuf {
        println!("cargo::rerun-if-env-changed=CUDA_HOME");
        let homes = [
            env::var_os("CUDA_HOME").map(PathBuf::from),
            env::var_os("HOME").map(|home| Path::new(&home).join(".cache/tenantry/cuda")),
        ];
        let found = homes.into_iter().flatten().map(|home| home.join("bin/nvcc")).find(|nvcc| nvcc.is_file());
        found.or_else(|| in_path("nvcc")).unwrap_or_else(|| {
            panic!("feature cuda needs nvcc; hint: run scripts/cuda-toolkit, or set CUDA_HOME to a CUDA toolkit")
        })
    }

    fn in_path(name: &str) -> Option<PathBuf> {
        env::split_paths(&env::var_os("PATH")?).map(|folder| folder.join(name)).find(|file| file.is_file())
    }
}
