//! The front that both planes serve: REST, gRPC, errors, authentication, limits, TLS
