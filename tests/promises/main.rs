//! What the product promises, tried with real servers and real processes. One module per kind of promise.

mod servers;
