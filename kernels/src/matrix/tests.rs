//! Packed values against candle's own quantiser and dequantiser, and refusals.

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use half::{bf16, f16};

use super::*;
use crate::testing::Noise;

fn candle_dtype(kind: BlockType) -> GgmlDType {
    match kind {
        BlockType::Q4_0 => GgmlDType::Q4_0,
        BlockType::Q4_1 => GgmlDType::Q4_1,
        BlockType::Q5_0 => GgmlDType::Q5_0,
        BlockType::Q5_1 => GgmlDType::Q5_1,
        BlockType::Q8_0 => GgmlDType::Q8_0,
        BlockType::Q2K => GgmlDType::Q2K,
        BlockType::Q3K => GgmlDType::Q3K,
        BlockType::Q4K => GgmlDType::Q4K,
        BlockType::Q5K => GgmlDType::Q5K,
        BlockType::Q6K => GgmlDType::Q6K,
    }
}

#[test]
fn dequantised_rows_equal_candles_bit_for_bit_in_every_format() {
    let (n_out, n_in) = (21, 512);
    let weights = Noise::new(7).values(n_out * n_in);
    for kind in BlockType::ALL {
        let tensor = Tensor::from_vec(weights.clone(), (n_out, n_in), &Device::Cpu).unwrap();
        let quantised = QTensor::quantize(&tensor, candle_dtype(kind)).unwrap();
        let expected = quantised.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let order: Vec<u32> = (0..n_out as u32).rev().collect();
        for rows in [None, Some(order.as_slice())] {
            let matrix = Matrix::from_blocks(n_out, n_in, kind, &quantised.data().unwrap(), rows).unwrap();
            let mut row = vec![0.0; n_in];
            for i in 0..n_out {
                matrix.row(i, &mut row);
                let source = rows.map_or(i, |rows| rows[i] as usize);
                for (k, (a, b)) in row.iter().zip(&expected[source * n_in..]).enumerate() {
                    assert_eq!(a.to_bits(), b.to_bits(), "{kind:?} row {i} input {k}: {a} {b}");
                }
            }
        }
    }
}

#[test]
fn every_bit_of_a_block_counts() {
    // Random bytes reach code and scale patterns a quantiser never writes.
    let mut noise = Noise::new(11);
    for kind in BlockType::ALL {
        let mut bytes: Vec<u8> = (0..kind.block_bytes() * 4).map(|_| noise.bits() as u8).collect();
        for block in bytes.chunks_exact_mut(kind.block_bytes()) {
            let halves: &[usize] = match kind {
                BlockType::Q4_0 | BlockType::Q5_0 | BlockType::Q8_0 => &[0],
                BlockType::Q4_1 | BlockType::Q5_1 | BlockType::Q4K | BlockType::Q5K => &[0, 2],
                BlockType::Q2K => &[80, 82],
                BlockType::Q3K => &[108],
                BlockType::Q6K => &[208],
            };
            for &at in halves {
                block[at..at + 2].copy_from_slice(&f16::from_f32(noise.value()).to_le_bytes());
            }
        }
        let n_in = kind.block_len() * 2;
        let matrix = Matrix::from_blocks(2, n_in, kind, &bytes, None).unwrap();
        let tensor = candle_core::quantized::ggml_file::qtensor_from_ggml(
            candle_dtype(kind),
            &bytes,
            vec![2, n_in],
            &Device::Cpu,
        )
        .unwrap();
        let expected = tensor.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let mut row = vec![0.0; n_in];
        for i in 0..2 {
            matrix.row(i, &mut row);
            let same = row.iter().zip(&expected[i * n_in..]).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "{kind:?}");
        }
    }
}

#[test]
fn dense_matrices_keep_their_values_and_dtype() {
    let (n_out, n_in) = (19, 7);
    let values = Noise::new(3).values(n_out * n_in);
    let halves: Vec<f16> = values.iter().map(|&v| f16::from_f32(v)).collect();
    let brains: Vec<bf16> = values.iter().map(|&v| bf16::from_f32(v)).collect();
    let dense = Matrix::from_f32(n_out, n_in, &values, None).unwrap();
    let half = Matrix::from_f16(n_out, n_in, &halves, None).unwrap();
    let brain = Matrix::from_bf16(n_out, n_in, &brains, None).unwrap();
    let mut row = vec![0.0; n_in];
    for i in 0..n_out {
        dense.row(i, &mut row);
        assert_eq!(row, values[i * n_in..][..n_in]);
        half.row(i, &mut row);
        assert!(row.iter().zip(&halves[i * n_in..]).all(|(a, b)| *a == b.to_f32()));
        brain.row(i, &mut row);
        assert!(row.iter().zip(&brains[i * n_in..]).all(|(a, b)| *a == b.to_f32()));
    }
    assert!(half.bytes() < dense.bytes());
}

#[test]
fn weights_take_as_many_bytes_as_in_the_file() {
    let (n_out, n_in) = (64, 512);
    for kind in BlockType::ALL {
        let in_file = n_out * n_in / kind.block_len() * kind.block_bytes();
        let matrix = Matrix::from_blocks(n_out, n_in, kind, &vec![0; in_file], None).unwrap();
        let bits = matrix.bytes() as f64 * 8.0 / (n_out * n_in) as f64;
        match kind {
            // Factors of 6 and 4 bits take 8; codes of 2 and 3 bits take 4.
            BlockType::Q4K => assert_eq!(bits, 4.625),
            BlockType::Q5K => assert_eq!(bits, 5.625),
            BlockType::Q2K => assert_eq!(bits, 5.125),
            BlockType::Q3K => assert_eq!(bits, 4.5625),
            _ => assert_eq!(matrix.bytes(), in_file, "{kind:?}"),
        }
    }
}

#[test]
fn wrong_sizes_orders_and_scales_are_refused() {
    let length = Matrix::from_f32(2, 3, &[0.0; 5], None).unwrap_err();
    assert_eq!(length.to_string(), "a [2, 3] matrix of f32 takes 6 values, got 5");
    let partial = Matrix::from_blocks(1, 48, BlockType::Q8_0, &[0; 51], None).unwrap_err();
    assert_eq!(partial.to_string(), "rows of 48 weights are no whole blocks of 32");
    assert!(matches!(
        Matrix::from_blocks(2, 32, BlockType::Q8_0, &[0; 34], None),
        Err(MatrixError::Length { expected: 68, got: 34, .. })
    ));
    assert!(matches!(Matrix::from_f32(2, 1, &[0.0; 2], Some(&[0])), Err(MatrixError::RowOrder { .. })));
    assert!(matches!(Matrix::from_f32(2, 1, &[0.0; 2], Some(&[0, 2])), Err(MatrixError::RowOrder { .. })));
    assert!(matches!(Matrix::from_f32(0, 1, &[], None), Err(MatrixError::Shape { .. })));
    assert!(matches!(Matrix::from_f32(usize::MAX, 2, &[], None), Err(MatrixError::Shape { .. })));
    let mut damaged = [0; 34];
    damaged[..2].copy_from_slice(&f16::INFINITY.to_le_bytes());
    let error = Matrix::from_blocks(1, 32, BlockType::Q8_0, &damaged, None).unwrap_err();
    assert_eq!(error, MatrixError::NotFinite { row: 0 });
}

#[test]
fn a_packed_matrix_comes_back_from_a_mapped_file_with_equal_values() {
    let (n_out, n_in) = (21, 512);
    let weights = Noise::new(3).values(n_out * n_in);
    let mut matrices = vec![
        Matrix::from_f32(n_out, n_in, &weights, None).unwrap(),
        Matrix::from_bf16(n_out, n_in, &weights.iter().map(|&w| bf16::from_f32(w)).collect::<Vec<_>>(), None).unwrap(),
        Matrix::from_f16(n_out, n_in, &weights.iter().map(|&w| f16::from_f32(w)).collect::<Vec<_>>(), None).unwrap(),
    ];
    for kind in BlockType::ALL {
        let tensor = Tensor::from_vec(weights.clone(), (n_out, n_in), &Device::Cpu).unwrap();
        let blocks = QTensor::quantize(&tensor, candle_dtype(kind)).unwrap();
        matrices.push(Matrix::from_blocks(n_out, n_in, kind, &blocks.data().unwrap(), None).unwrap());
    }
    let path = std::env::temp_dir().join(format!("tenantry-packed-{}", std::process::id()));
    let mut file = std::fs::File::create(&path).unwrap();
    matrices.iter().for_each(|matrix| matrix.write_packed(&mut file).unwrap());
    let whole = std::sync::Arc::new(crate::mapping::Mapping::open(&std::fs::File::open(&path).unwrap()).unwrap());
    let mut at = 0;
    for matrix in &matrices {
        let (mapped, end) = Matrix::from_packed(&whole, at).unwrap();
        let (mut expected, mut found) = (vec![0.0; n_in], vec![0.0; n_in]);
        for i in 0..n_out {
            matrix.row(i, &mut expected);
            mapped.row(i, &mut found);
            assert_eq!(expected, found, "row {i}");
        }
        at = end;
    }
    assert_eq!(at, whole.bytes().len());
    assert!(matches!(Matrix::from_packed(&whole, at), Err(MatrixError::Packed { .. })), "the end is no matrix");
    let short = &whole.bytes()[..at - 64];
    std::fs::write(path.with_extension("short"), short).unwrap();
    let cut = std::fs::File::open(path.with_extension("short")).unwrap();
    let cut = std::sync::Arc::new(crate::mapping::Mapping::open(&cut).unwrap());
    let last = at - matrices.last().unwrap().bytes() - 64;
    assert!(matches!(Matrix::from_packed(&cut, last), Err(MatrixError::Packed { .. })), "cut off");
    for name in [path.clone(), path.with_extension("short")] {
        std::fs::remove_file(name).unwrap();
    }
}

/// FNV-1a, 64 bits.
fn fingerprint(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// Copies of bases outlive programs: one that packs the same weights into other bytes must have another version, or it
/// would read an older copy as its own.
#[test]
fn the_packed_bytes_are_those_of_the_layout_version() {
    let (n_out, n_in) = (21, 512);
    let numbers: Vec<f32> = (0..n_out * n_in).map(|i| (i % 251) as f32 - 125.0).collect();
    let halves: Vec<f16> = numbers.iter().map(|&number| f16::from_f32(number)).collect();
    let brains: Vec<bf16> = numbers.iter().map(|&number| bf16::from_f32(number)).collect();
    let mut matrices = vec![
        Matrix::from_f32(n_out, n_in, &numbers, None).unwrap(),
        Matrix::from_f16(n_out, n_in, &halves, None).unwrap(),
        Matrix::from_bf16(n_out, n_in, &brains, None).unwrap(),
    ];
    for kind in BlockType::ALL {
        let n = n_out * n_in / kind.block_len() * kind.block_bytes();
        // Every byte below 0x3c: any two of them are a finite f16.
        let bytes: Vec<u8> = (0..n).map(|i| (i * 37 % 59) as u8).collect();
        matrices.push(Matrix::from_blocks(n_out, n_in, kind, &bytes, None).unwrap());
    }
    let found = matrices.iter().map(|matrix| {
        let mut bytes = Vec::new();
        matrix.write_packed(&mut bytes).unwrap();
        fingerprint(&bytes)
    });
    // Other numbers here ask for another version.
    assert_eq!((PACKED_LAYOUT, found.collect::<Vec<_>>()), (1, PACKED_BYTES.to_vec()));
}

/// Of f32, f16, bf16 and the block types in their order.
const PACKED_BYTES: [u64; 13] = [
    0x21ec_62e2_2164_74ca,
    0x4da3_bb9a_2ef6_cbb4,
    0x46d4_3294_991d_abc0,
    0x95ca_a2d6_3c7a_1409,
    0x4513_ede3_f12d_0b95,
    0x1400_7223_e183_8246,
    0xb7e3_a59d_b747_662b,
    0x25ea_9f25_81b9_ed38,
    0x9e99_f87d_77c9_0acb,
    0x8bf7_34ac_e48a_3ff7,
    0xfa2a_f08f_5a1c_24a6,
    0x5d80_ea71_4168_0558,
    0x614e_bc10_df8c_7a39,
];
