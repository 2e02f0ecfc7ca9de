//! Real servers, installed on first use and started on loopback.

pub mod openbao;
