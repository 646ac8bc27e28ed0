//! Adapters of running requests on the device. An adapter is uploaded with the first step that has a row of it and cleared
//! and freed with the first step after its last lease has ended; who may use it is decided elsewhere.
//!
//! The upload happens in the step, on all cores: other streams wait for it.

use std::ops::Range;
use std::sync::{Arc, Weak};

use kernels::cuda::lora::{DeviceAdapter, DevicePair, PackedPair};
use kernels::cuda::{Gpu, GpuError};

use crate::adapter::LoraAdapter;
use crate::info::{Linear, ModelInfo};

/// What is on the device.
#[derive(Debug)]
pub(super) struct Adapters<G: Gpu> {
    /// The weak reference keeps the address from being used again.
    known: Vec<(Weak<LoraAdapter>, Arc<DeviceAdapter<G>>)>,
}

impl<G: Gpu> Default for Adapters<G> {
    fn default() -> Self {
        Self { known: Vec::new() }
    }
}

/// Number of a linear layer's pair within a device adapter.
pub(super) fn pair_index(layer: usize, linear: Linear) -> usize {
    layer * Linear::ALL.len() + linear as usize
}

/// Rows of a step and the adapter they share.
type Segment<G> = (Range<usize>, Arc<DeviceAdapter<G>>);

// === impl Adapters ===

impl<G: Gpu> Adapters<G> {
    /// The device's copies of the adapters of a step, uploading what is not there; drops what nobody leases any more.
    pub(super) fn of_step(
        &mut self,
        gpu: &G,
        info: &ModelInfo,
        segments: &[(Range<usize>, &Arc<LoraAdapter>)],
    ) -> Result<Vec<Segment<G>>, GpuError> {
        self.drop_unused(gpu)?;
        segments.iter().map(|(rows, adapter)| Ok((rows.clone(), self.find(gpu, info, adapter)?))).collect()
    }

    fn find(
        &mut self,
        gpu: &G,
        info: &ModelInfo,
        adapter: &Arc<LoraAdapter>,
    ) -> Result<Arc<DeviceAdapter<G>>, GpuError> {
        if let Some((_, found)) = self.known.iter().find(|(known, _)| known.as_ptr() == Arc::as_ptr(adapter)) {
            return Ok(Arc::clone(found));
        }
        let upload = |pair: Option<PackedPair>| pair.map(|pair| DevicePair::upload(gpu, &pair)).transpose();
        let pairs = packed(info, adapter).into_iter().map(upload).collect::<Result<_, _>>()?;
        let uploaded = Arc::new(DeviceAdapter::new(gpu, pairs));
        self.known.push((Arc::downgrade(adapter), Arc::clone(&uploaded)));
        Ok(uploaded)
    }

    /// Clears adapters whose last lease has ended. The last step's plan may still hold one: then the next step clears it.
    fn drop_unused(&mut self, gpu: &G) -> Result<(), GpuError> {
        for (leased, adapter) in &mut self.known {
            if leased.strong_count() == 0
                && let Some(adapter) = Arc::get_mut(adapter)
            {
                adapter.clear(gpu)?;
            }
        }
        self.known.retain(|(leased, adapter)| leased.strong_count() > 0 || Arc::strong_count(adapter) > 1);
        Ok(())
    }
}

/// All pairs of an adapter in the device's form, made on all cores.
fn packed(info: &ModelInfo, adapter: &LoraAdapter) -> Vec<Option<PackedPair>> {
    // Ranks and shapes were checked when the adapter was loaded, widths when the runtime was made.
    let pack = |pair: &_| PackedPair::of(pair).expect("an adapter of this model fits the device");
    let layer = |layer: usize| Linear::ALL.map(|linear| adapter.pair(layer, linear).map(pack));
    let n_threads = std::thread::available_parallelism().map_or(1, usize::from).min(info.n_layers);
    let share = info.n_layers.div_ceil(n_threads);
    std::thread::scope(|scope| {
        let starts = (0..info.n_layers).step_by(share);
        let threads: Vec<_> = starts
            .map(|start| {
                let layers = start..(start + share).min(info.n_layers);
                scope.spawn(move || layers.flat_map(layer).collect::<Vec<_>>())
            })
            .collect();
        threads.into_iter().flat_map(|thread| thread.join().expect("packing does not panic")).collect()
    })
}
