//! The journal: no answer without its row, whatever happens to the disk, the network or the process.

use std::fs;

use anyhow::Result;
use scaivault_tests::faults::Fault;
use scaivault_tests::planes::{Federated, Options, Rest};
use scaivault_tests::wait;
use serde_json::json;

const DB: &str = "/v1/secrets/external/hashicorp/app/db";

/// Waits until each of these requests has its row, and checks that none has two.
async fn each_once(rest: &Rest, requests: &[String]) -> Result<()> {
    wait::until("every row has arrived", async || {
        let rows = rest.audit().await?;
        let counts = requests.iter().map(|id| rows.iter().filter(|row| row["request_id"] == **id).count());
        let counts: Vec<_> = counts.collect();
        assert!(counts.iter().all(|count| *count <= 1), "{counts:?}");
        Ok(counts.iter().all(|count| *count == 1).then_some(()))
    })
    .await
}

/// Reads until it is refused because of the audit trail, and returns the requests that were answered with the value.
async fn read_until_refused(rest: &Rest) -> Result<Vec<String>> {
    let mut answered = Vec::new();
    wait::until("the journal takes no more", async || {
        let answer = rest.get(DB).await?;
        if answer.status == 200 {
            answered.push(answer.header("x-request-id").to_owned());
            return Ok(None);
        }
        assert_eq!(answer.refusal(), (503, "audit_unavailable"), "{}", answer.text);
        assert!(!answer.text.contains("three") && !answer.header("retry-after").is_empty());
        Ok(Some(()))
    })
    .await?;
    Ok(answered)
}

async fn read_until_answered(rest: &Rest) -> Result<()> {
    wait::until("reads are answered again", async || Ok((rest.get(DB).await?.status == 200).then_some(())))
        .await
}

#[tokio::test]
async fn no_value_leaves_while_the_journal_is_full_and_it_drains_when_the_control_plane_is_back() -> Result<()>
{
    let mut federated = Federated::start_with(Options::default().audit_max_bytes(20_000)).await?;
    let rest = federated.planes.rest(0)?;
    federated.planes.control_plane.kill9();
    let mut answered = read_until_refused(&rest).await?;
    // Rows that are packed meanwhile take less space, and then there is room for some more.
    answered.extend(read_until_refused(&rest).await?);
    assert!(answered.len() > 5, "{}", answered.len());
    federated.planes.control_plane.start_again().await?;
    read_until_answered(&rest).await?;
    each_once(&federated.planes.rest(0)?, &answered).await
}

#[tokio::test]
async fn no_value_leaves_while_the_journal_cannot_be_written() -> Result<()> {
    let federated = Federated::start().await?;
    let rest = federated.planes.rest(0)?;
    rest.put_data("own", json!({ "password": "three" })).await?;
    let planes = &federated.planes;
    // The control plane gives older versions, nodes only the current one.
    let own = "/v1/secrets/own?version=1";
    for (plane, path) in [(&planes.nodes[0], DB), (&planes.control_plane, own)] {
        let (dir, aside) = (plane.dir().join("audit"), plane.dir().join("aside"));
        let mut answered = Vec::new();
        for _ in 0..3 {
            let answer = rest.get(path).await?;
            assert_eq!(answer.status, 200);
            answered.push(answer.header("x-request-id").to_owned());
        }
        fs::rename(&dir, &aside)?;
        fs::write(&dir, "in the way")?;
        wait::until("the value stays here", async || {
            let answer = rest.get(path).await?;
            if answer.status == 200 {
                answered.push(answer.header("x-request-id").to_owned());
                return Ok(None);
            }
            assert_eq!(answer.refusal(), (503, "audit_unavailable"), "{}", answer.text);
            assert!(!answer.text.contains("three"));
            Ok(Some(()))
        })
        .await?;
        fs::remove_file(&dir)?;
        fs::rename(&aside, &dir)?;
        wait::until("it heals", async || Ok((rest.get(path).await?.status == 200).then_some(()))).await?;
        each_once(&rest, &answered).await?;
    }
    Ok(())
}

#[tokio::test]
async fn rows_survive_the_death_of_their_node_and_arrive_once() -> Result<()> {
    let mut federated = Federated::start_with(Options::default().cuttable()).await?;
    let rest = federated.planes.rest(0)?;
    let mut answered = Vec::new();
    for round in 0..3 {
        federated.planes.link(0).set(Fault::Cut).await?;
        for _ in 0..20 {
            let answer = rest.get(DB).await?;
            answered.push(answer.header("x-request-id").to_owned());
            assert_eq!(answer.status, 200, "{}", answer.text);
        }
        federated.planes.nodes[0].kill9();
        // Once the link is there before the node, once after it.
        if round == 1 {
            federated.planes.link(0).set(Fault::Pass).await?;
        }
        federated.planes.nodes[0].start_again().await?;
        federated.planes.link(0).set(Fault::Pass).await?;
        federated.planes.nodes[0].ready().await?;
        read_until_answered(&rest).await?;
    }
    let direct = federated.planes.control_plane_rest()?;
    each_once(&direct, &answered).await?;
    // What comes later brings none of them again.
    answered.push(rest.get(DB).await?.header("x-request-id").to_owned());
    each_once(&direct, &answered).await
}
