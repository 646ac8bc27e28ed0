//! The reference of attention: one query at a time, one position at a time.

use half::f16;

use super::{Query, Unit};
use crate::kv::{KvDtype, PAGE_TOKENS};
use crate::ops;

pub(super) fn run(unit: &Unit<'_>, probabilities: &mut [f32]) {
    for index in 0..unit.n_queries() {
        let query = unit.query(index);
        attend(unit, query, &mut probabilities[..query.limit]);
    }
}

fn attend(unit: &Unit<'_>, query: Query, probabilities: &mut [f32]) {
    let q = unit.q_of(query);
    let head_dim = q.len();
    let mut max = f32::NEG_INFINITY;
    for (position, score) in probabilities.iter_mut().enumerate() {
        let dot = q.iter().enumerate().fold(0.0, |acc: f32, (d, q)| q.mul_add(key(unit, position, d), acc));
        *score = dot * unit.scale;
        max = if *score > max { *score } else { max };
    }
    let mut parts = [0.0f32; PAGE_TOKENS];
    for (position, probability) in probabilities.iter_mut().enumerate() {
        *probability = ops::exp(*probability - max);
        parts[position % PAGE_TOKENS] += *probability;
    }
    let inverse = 1.0 / ops::tree_sum(parts);
    // SAFETY: the unit owns this head of this row.
    let out = unsafe { unit.out.cols(query.row, query.column, head_dim) };
    for (d, out) in out.iter_mut().enumerate() {
        let mixed = probabilities
            .iter()
            .enumerate()
            .fold(0.0, |acc: f32, (position, probability)| probability.mul_add(value(unit, position, d), acc));
        *out = mixed * inverse;
    }
}

fn key(unit: &Unit<'_>, position: usize, d: usize) -> f32 {
    read(unit, position, true, d * PAGE_TOKENS + position % PAGE_TOKENS)
}

fn value(unit: &Unit<'_>, position: usize, d: usize) -> f32 {
    read(unit, position, false, position % PAGE_TOKENS * unit.kv.layout().head_dim + d)
}

fn read(unit: &Unit<'_>, position: usize, keys: bool, at: usize) -> f32 {
    let page = unit.pages[position / PAGE_TOKENS];
    match unit.kv.layout().dtype {
        KvDtype::F32 => {
            let (k, v) = unit.kv.head::<f32>(unit.layer, page, unit.kv_head);
            if keys { k[at] } else { v[at] }
        }
        KvDtype::F16 => {
            let (k, v) = unit.kv.head::<u16>(unit.layer, page, unit.kv_head);
            f16::from_bits(if keys { k[at] } else { v[at] }).to_f32()
        }
    }
}
