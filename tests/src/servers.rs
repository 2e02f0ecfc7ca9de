//! Real servers, installed on first use and started on loopback.

pub mod drongo;
pub mod microburst;
pub mod moto;
pub mod openbao;
mod python;
