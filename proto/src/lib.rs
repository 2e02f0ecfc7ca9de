//! The wire: generated messages, services and descriptors
