//! The generator's own randomness: one seed, one run. SplitMix64 (Steele, Lea, Flood: Fast splittable
//! pseudorandom number generators, 2014), because a load must be the same on every machine and in every version.

/// A stream of random numbers.
#[derive(Debug, Clone)]
pub struct Random {
    state: u64,
}

// === impl Random ===

impl Random {
    /// The stream of this seed.
    pub fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    /// A stream of its own for part `index`, so that streams do not depend on each other's progress.
    #[must_use]
    pub fn part(&self, index: u64) -> Self {
        let mut part = Self { state: self.state ^ index.wrapping_mul(0xd6e8_feb8_6659_fd93) };
        part.next_u64();
        part
    }

    /// 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in [0, 1).
    pub fn unit(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// Uniform in 0..n; `n` must not be 0.
    pub fn below(&mut self, n: usize) -> usize {
        ((self.unit() * n as f64) as usize).min(n - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gives_the_published_sequence() {
        // Reference values of splitmix64 for seed 1234567, as published with the test vectors of its C version.
        let mut random = Random::new(1_234_567);
        let found: Vec<u64> = (0..3).map(|_| random.next_u64()).collect();
        assert_eq!(found, [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]);
    }

    #[test]
    fn parts_differ_and_repeat() {
        let root = Random::new(7);
        assert_eq!(root.part(3).next_u64(), root.part(3).next_u64());
        assert_ne!(root.part(3).next_u64(), root.part(4).next_u64());
    }
}
