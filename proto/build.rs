//! Generates messages, services and the descriptor set that reflection serves. Pure Rust: no protoc.

use prost::Message as _;

/// Messages that carry a value or a credential: their `Debug` is written by hand and shows neither.
const SECRET: &[&str] = &[
    "scaivault.secrets.v1.Secret",
    "scaivault.secrets.v1.PutRequest",
    "scaivault.admin.v1.CreateTokenResponse",
    "scaivault.admin.v1.CreateNodeResponse",
    "scaivault.discovery.v1.EnrolRequest",
    "scaivault.discovery.v1.Lease",
    "scaivault.discovery.v1.AwsKeys",
    "scaivault.discovery.v1.SecretCopy",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["secrets", "federation", "admin", "discovery"]
        .map(|name| format!("scaivault/{name}/v1/{name}.proto"));
    let descriptors = protox::compile(&files, ["."])?;
    let out = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;

    let mut config = tonic_prost_build::Config::new();
    config
        .skip_debug(SECRET)
        .btree_map([".scaivault.discovery.v1.SecretCopy.metadata"])
        .bytes([".scaivault.discovery.v1.ShipSegmentRequest.segment", ".scaivault.secrets.v1"]);
    tonic_prost_build::configure().compile_fds_with_config(descriptors, config)?;
    println!("cargo::rerun-if-changed=scaivault");
    Ok(())
}
