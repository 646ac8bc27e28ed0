//! What the tests of all operations share: deterministic numbers, and the macro that stamps one set of cases on every
//! backend.

use proptest::strategy::Strategy;
use proptest::test_runner::{Config, TestRunner};

use crate::backend::{Backend, force};

/// A small generator (splitmix64); the same seed gives the same numbers.
#[derive(Debug)]
pub(crate) struct Noise(u64);

// === impl Noise ===

impl Noise {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Bell-shaped around 0, about -3 to 3.
    pub(crate) fn value(&mut self) -> f32 {
        (0..4).map(|_| (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0).sum()
    }

    pub(crate) fn values(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.value()).collect()
    }
}

/// The bits of every value, all NaNs alike.
pub(crate) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| if value.is_nan() { u32::MAX } else { value.to_bits() }).collect()
}

/// Runs `f` with every kernel on `backend`.
pub(crate) fn with<T>(backend: Backend, f: impl FnOnce() -> T) -> T {
    let _forced = force(backend);
    f()
}

/// Stamps the same cases, functions that take a [`Backend`], on every backend. One that this machine lacks is skipped
/// with a line that says so.
macro_rules! on_every_backend {
    (@on $module:ident, $backend:ident, $($case:ident,)*) => {
        mod $module {
            use $crate::backend::Backend;
            $(#[test] fn $case() {
                if Backend::$backend.is_available() {
                    super::$case(Backend::$backend);
                } else {
                    eprintln!("SKIPPED {}: this machine has no {:?}", stringify!($case), Backend::$backend);
                }
            })*
        }
    };
    ($($case:ident),* $(,)?) => {
        $crate::testing::on_every_backend!(@on on_scalar, Scalar, $($case,)*);
        $crate::testing::on_every_backend!(@on on_avx2, Avx2, $($case,)*);
        $crate::testing::on_every_backend!(@on on_avx2_vnni, Avx2Vnni, $($case,)*);
        $crate::testing::on_every_backend!(@on on_avx512, Avx512, $($case,)*);
    };
}
pub(crate) use on_every_backend;

/// Runs a property on `cases` random inputs.
pub(crate) fn check<S: Strategy>(cases: u32, strategy: S, property: impl Fn(S::Value)) {
    let mut runner = TestRunner::new(Config { cases, failure_persistence: None, ..Config::default() });
    runner
        .run(&strategy, |input| {
            property(input);
            Ok(())
        })
        .unwrap_or_else(|error| panic!("{error}"));
}
