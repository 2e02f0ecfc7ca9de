//! The delta protocol between the planes
