//! Every kernel as a fraction of what this machine can do, both measured in this run: see the example `limits`, which
//! is the same program.

#[path = "../examples/limits.rs"]
mod limits;

fn main() {
    limits::main();
}
