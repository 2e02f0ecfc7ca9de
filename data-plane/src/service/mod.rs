//! What a node does itself: reads.

pub mod read;
