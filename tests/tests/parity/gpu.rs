//! The forward pass of a GPU: with the feature `cuda` on the first device (skipped, with a line that says so, where there
//! is none), else emulated on the CPU, where the real model would take hours and is left out.

use std::sync::Arc;

use candle_core::quantized::GgmlDType;
use model::base::BaseModel;
use model::forward::RuntimeOptions;
use model::gpu::GpuRuntime;
use model::info::Numerics;
use model::step::Forward;
use tests::tiny::{self, Quantisation, Random, TinySpec};

use crate::invariance::{check, tiny_bench_with};
use crate::lab::{self, Lab};

/// Largest difference of a logit between the passes of a CPU and a GPU. Both round activations to 8 bits; a sum in
/// another order moves one over an edge now and then, which is a step of 1/127 of the largest of its block.
const LOGIT_DIFF_MAX: f32 = 0.25;

#[cfg(feature = "cuda")]
mod executor {
    use std::sync::OnceLock;

    use kernels::cuda::GpuError;
    use kernels::cuda::device::Device;

    /// Keeps the driver's context alive between runtimes: making it takes long.
    fn first() -> &'static Result<Device, GpuError> {
        static FIRST: OnceLock<Result<Device, GpuError>> = OnceLock::new();
        FIRST.get_or_init(|| Device::new(0))
    }

    pub(super) fn absent() -> bool {
        first().as_ref().inspect_err(|error| eprintln!("SKIPPED: {error}")).is_err()
    }

    pub(super) fn gpu() -> Device {
        Device::new(0).expect("a case begins by asking whether there is a device")
    }
}

#[cfg(not(feature = "cuda"))]
mod executor {
    use kernels::cuda::emulation::Emulated;

    pub(super) fn absent() -> bool {
        false
    }

    pub(super) fn gpu() -> Emulated {
        Emulated::default()
    }
}

use executor::{absent, gpu};

/// The runtime of a model that was loaded for a GPU.
pub(crate) fn runtime(base: &BaseModel, options: RuntimeOptions) -> Box<dyn Forward> {
    Box::new(GpuRuntime::new(gpu(), base, options).expect("a runtime"))
}

/// The same with heads as wide as tensor cores want them.
fn wider(spec: TinySpec) -> TinySpec {
    TinySpec { head_dim: spec.head_dim.max(32), ..spec }
}

/// Cases of a property test, fewer where every one takes seconds.
fn cases(on_device: u32) -> u32 {
    if cfg!(feature = "cuda") { on_device } else { 2 }
}

#[test]
fn any_mix_on_a_gpu_gives_identical_bits() {
    if absent() {
        return;
    }
    let kinds = [
        ("gpu-q4", wider(TinySpec::llama()), Some(Quantisation::All(GgmlDType::Q4_1))),
        ("gpu-k", wider(TinySpec::wide()), Some(Quantisation::Q4KM)),
        ("gpu-qwen2", wider(TinySpec::qwen2()), Some(Quantisation::All(GgmlDType::Q8_0))),
        ("gpu-float", wider(TinySpec::llama3()), None),
    ];
    let (length_max, n_max) = if cfg!(feature = "cuda") { (150, 12) } else { (20, 3) };
    for (name, spec, quantisation) in kinds {
        check(&tiny_bench_with(name, &spec, quantisation, Numerics::Gpu), cases(12), length_max, n_max);
    }
}

/// Logits of a CPU and of a GPU for the last of some random tokens, with and without an adapter.
fn compare(name: &str, spec: &TinySpec, quantisation: Option<Quantisation>) {
    let dir = lab::folder(name);
    let path = match quantisation {
        None => spec.write_hf(&dir),
        Some(quantisation) => spec.write_gguf(&dir, quantisation),
    };
    let files = tiny::AdapterSpec::new(1, 8, &model::info::Linear::ALL).files(spec);
    let [cpu, on_gpu] = [Numerics::Fast, Numerics::Gpu].map(|numerics| lab::load(&path, numerics));
    let mut random = Random::new(9);
    let tokens: Vec<u32> = (0..40).map(|_| random.below(tiny::VOCAB) as u32).collect();
    for adapted in [false, true] {
        let logits = |base: &Arc<BaseModel>| {
            let adapter = adapted.then(|| lab::pack(base, &files));
            let mut lab = Lab::new(base, 1, 64, 64, 1);
            let mut sequence = lab.sequence(&tokens, 0, adapter.as_ref());
            lab.finish(&mut sequence)
        };
        let off = lab::distance(&logits(&cpu), &logits(&on_gpu));
        println!("{name}, adapter {adapted}: logits differ by {off}");
        assert!(off <= LOGIT_DIFF_MAX, "{name}, adapter {adapted}: {off}");
    }
}

#[test]
fn a_gpu_computes_what_a_cpu_computes() {
    if absent() {
        return;
    }
    for kind in [GgmlDType::Q4_0, GgmlDType::Q4_1, GgmlDType::Q8_0] {
        compare(&format!("gpu-{kind:?}"), &wider(TinySpec::llama()), Some(Quantisation::All(kind)));
    }
    compare("gpu-q4km", &wider(TinySpec::wide()), Some(Quantisation::Q4KM));
    compare("gpu-q5km", &wider(TinySpec::wide()), Some(Quantisation::Q5KM));
    compare("gpu-f16", &wider(TinySpec::mistral()), Some(Quantisation::F16));
    compare("gpu-hf", &wider(TinySpec::llama3()), None);
    compare("gpu-qwen", &wider(TinySpec::qwen2()), Some(Quantisation::All(GgmlDType::Q8_0)));
}

#[test]
fn keys_of_a_freed_page_show_as_nan_on_a_gpu() {
    if absent() {
        return;
    }
    let path = wider(TinySpec::llama()).write_gguf(&lab::folder("gpu-poison"), Quantisation::All(GgmlDType::Q8_0));
    let mut lab = Lab::new(&lab::load(&path, Numerics::Gpu), 1, 32, 64, 0);
    let mut sequence = lab.sequence(&[1; 20], 0, None);
    let first = lab.step(&mut [(&mut sequence, 18)], false);
    assert!(first[0].iter().all(|logit| logit.is_finite()));
    lab.poison(&sequence);
    let after = lab.step(&mut [(&mut sequence, 2)], false);
    assert!(after[0].iter().all(|logit| logit.is_nan()));
}

#[cfg(feature = "cuda")]
mod real {
    use super::*;

    #[test]
    fn a_gpu_answers_the_goldens_as_closely_as_a_cpu() {
        if absent() {
            return;
        }
        crate::goldens::rounded_numerics_stay_close(Numerics::Gpu);
    }

    #[test]
    fn any_mix_of_the_real_model_on_a_gpu_gives_identical_bits() {
        if absent() {
            return;
        }
        check(&crate::invariance::real_bench(Numerics::Gpu), 6, 60, 8);
    }
}
