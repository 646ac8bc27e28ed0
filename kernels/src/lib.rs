//! Everything unsafe and everything fast: CPU kernels with a scalar reference each.
