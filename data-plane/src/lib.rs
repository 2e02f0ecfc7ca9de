//! A data-plane node: verifies, authorises, routes, proxies
