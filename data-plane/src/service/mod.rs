//! What a node does itself: proxied reads.

pub mod read;
