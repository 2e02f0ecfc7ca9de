//! The parts of the command line that other programs use too.

pub mod dev;
