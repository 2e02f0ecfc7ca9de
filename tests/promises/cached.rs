//! A node's cache: what a node holds it serves without the control plane, for as long as it may and not longer, whatever
//! becomes of its disk; and what it serves is never older than what its callers know.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures::future::try_join_all;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use scaivault_domain::backend::KvVersion;
use scaivault_tests::planes::{self, CREDENTIAL, Options, Plane, Planes, Rest};
use scaivault_tests::servers::openbao::{self, Admin, OpenBao};
use scaivault_tests::wait;
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::canary::{BIRD, Needles, files_below};

const NO_CONTROL_PLANE: (u16, &str) = (503, "control_plane_unavailable");
const OFFLINE_TOO_LONG: (u16, &str) = (503, "offline_too_long");
/// How soon a node that was started serves what it holds.
const SERVES: Duration = Duration::from_secs(2);
/// Requests at the same time.
const AT_ONCE: usize = 8;

/// What each path has.
pub(crate) type Values = BTreeMap<String, Value>;

/// An OpenBao whose mount `secret/` is copied to `copied/**`.
pub(crate) struct Synced {
    pub(crate) planes: Planes,
    pub(crate) bao: OpenBao,
    pub(crate) backend: String,
}

impl Synced {
    /// Starts the planes and an OpenBao that has `values`. What `settings` say is changed of the backend, which syncs
    /// each second. Returns when the first run has copied everything.
    pub(crate) async fn start(options: Options, settings: Value, values: &Values) -> Result<Synced> {
        Synced::on(Planes::start(options).await?, settings, values).await
    }

    /// The same with planes that run already.
    pub(crate) async fn on(planes: Planes, settings: Value, values: &Values) -> Result<Synced> {
        let bao = OpenBao::start(openbao::Options::default()).await?;
        let (admin, operator) = (bao.client()?, planes.control_plane_rest()?);
        admin.enable_kv("secret", KvVersion::V2).await?;
        put_upstream(&admin, values).await?;
        operator.put_data(CREDENTIAL, planes::application(&admin, planes::POLICY).await?).await?;
        let mapping = json!({ "copied/**": "secret/data/**" });
        let mut backend = planes::backend("copied", &bao.addr(), CREDENTIAL, mapping);
        planes::merge(&mut backend, &json!({ "mode": "sync", "sync_interval": "1s" }));
        planes::merge(&mut backend, &settings);
        let backend = operator.configure(backend).await?;
        let run = operator.sync(&backend).await?;
        ensure!(run["outcome"] == "complete", "{run}");
        Ok(Synced { planes, bao, backend })
    }

    /// What the status says of each node.
    async fn nodes(&self) -> Result<Vec<Value>> {
        let status = self.planes.control_plane_rest()?.status(&self.backend).await?;
        Ok(status["nodes"].as_array().context("nodes")?.clone())
    }

    /// Waits until every node holds every copy.
    pub(crate) async fn prefetched(&self) -> Result<()> {
        wait::until("every node holds every copy", async || {
            Ok(self.nodes().await?.iter().all(|node| node["prefetched"] == true).then_some(()))
        })
        .await
    }
}

/// Writes to the mount what the paths below `copied/` are to have.
pub(crate) async fn put_upstream(admin: &Admin, values: &Values) -> Result<()> {
    let copies = values.iter().filter_map(|(path, value)| Some((path.strip_prefix("copied/")?, value)));
    stream::iter(copies)
        .map(Ok)
        .try_for_each_concurrent(AT_ONCE, async |(name, value)| {
            admin.put("secret", name, value.clone()).await.map(drop)
        })
        .await
}

/// Values of these paths that no other path has.
fn values(paths: impl IntoIterator<Item = impl Into<String>>) -> Values {
    let value = |path: &str| json!({ "of": path, "number": rand::random::<u32>() });
    paths.into_iter().map(Into::into).map(|path| (path.clone(), value(&path))).collect()
}

pub(crate) fn url(path: &str) -> String {
    format!("/v1/secrets/{path}")
}

async fn has(rest: &Rest, path: &str, expected: &Value) -> Result<()> {
    let data = rest.get(&url(path)).await?.ok().with_context(|| path.to_owned())?["data"].take();
    ensure!(data == *expected, "{path} has {data} instead of {expected}");
    Ok(())
}

/// Every one of the paths has what it should.
pub(crate) async fn have(rest: &Rest, values: &Values) -> Result<()> {
    stream::iter(values)
        .map(Ok)
        .try_for_each_concurrent(AT_ONCE, async |(path, value)| has(rest, path, value).await)
        .await
}

/// How many of the paths are served. The others are refused for want of the control plane; none has what is not its own.
async fn served(rest: &Rest, values: &Values) -> Result<usize> {
    let answers = stream::iter(values).map(async |(path, value)| {
        let answer = rest.get(&url(path)).await?;
        match answer.status {
            200 if answer.json["data"] == *value => Ok(1),
            503 => Ok(0),
            _ => bail!("{path} has {} {} instead of {value}", answer.status, answer.text),
        }
    });
    answers.buffer_unordered(AT_ONCE).try_fold(0, async |sum, one| Ok(sum + one)).await
}

async fn has_soon(rest: &Rest, values: &Values) -> Result<()> {
    wait::until("everything is served again", async || {
        Ok((served(rest, values).await? == values.len()).then_some(()))
    })
    .await
}

/// Shows the token to the node, which reads no secret.
async fn is_known(rest: &Rest) -> Result<()> {
    let answer = rest.get(&url("local/is-not-there")).await?;
    ensure!(answer.status == 404, "{} {}", answer.status, answer.text);
    Ok(())
}

/// Kills the node and starts it again; how long it took until it served `path`.
pub(crate) async fn restart(node: &mut Plane, rest: &Rest, path: &str) -> Result<Duration> {
    node.kill9();
    let start = Instant::now();
    node.start_again().await?;
    rest.get(&url(path)).await?.ok().context("held before the node was killed")?;
    Ok(start.elapsed())
}

/// Stops the node in order, so that all it holds is on its disk, and starts it again.
async fn settle(node: &mut Plane) -> Result<()> {
    node.stop().await?;
    node.start_again().await?;
    node.ready().await
}

async fn is_linked(rest: &Rest) -> Result<()> {
    wait::until("the node follows the control plane", async || {
        let answer = rest.without_token().get("/readyz").await?;
        Ok((answer.status == 200 && answer.json["reasons"] == json!([])).then_some(()))
    })
    .await
}

#[tokio::test]
async fn what_is_held_is_served_without_the_control_plane_also_by_a_node_that_starts_then() -> Result<()> {
    let held = values(["copied/held", "copied/a/b/c", "local/held"]);
    let never = values(["copied/never-0", "copied/never-1", "local/never-0", "local/never-1"]);
    let all = [held.clone(), never.clone()].into_iter().flatten().collect();
    let mut synced = Synced::start(Options::default(), json!({}), &all).await?;
    let (rest, control_plane) = (synced.planes.rest(0)?, synced.planes.control_plane_rest()?);
    for (path, value) in all.iter().filter(|(path, _)| path.starts_with("local/")) {
        control_plane.put_data(path, value.clone()).await?;
    }
    have(&rest, &held).await?;
    settle(&mut synced.planes.nodes[0]).await?;

    let mut slowest = Duration::ZERO;
    for outage in 0..2 {
        let rules = json!([{ "path": "**", "capabilities": ["read"] }]);
        let stranger = control_plane.issue(&format!("stranger-{outage}"), &["secrets:read"], rules).await?;
        let stranger = rest.with_token(&stranger.token)?;
        let never: Values = never
            .iter()
            .filter(|(path, _)| path.ends_with(&outage.to_string()))
            .map(|(path, value)| (path.clone(), value.clone()))
            .collect();
        match outage {
            0 => synced.planes.control_plane.stop().await?,
            _ => synced.planes.control_plane.kill9(),
        }
        for start in 0..=5 {
            if start > 0 {
                slowest = slowest.max(restart(&mut synced.planes.nodes[0], &rest, "copied/held").await?);
            }
            have(&rest, &held).await?;
            for path in never.keys() {
                let refused = rest.get(&url(path)).await?;
                assert_eq!(refused.refusal(), NO_CONTROL_PLANE, "{path}: {}", refused.text);
                assert_ne!(refused.header("retry-after"), "");
            }
            let refused = stranger.get(&url("copied/held")).await?;
            assert_eq!(refused.refusal(), NO_CONTROL_PLANE, "{}", refused.text);
        }
        synced.planes.control_plane.start_again().await?;
        is_linked(&rest).await?;
        have(&rest, &never).await?;
        have(&stranger, &held).await?;
    }
    println!("10 of 10 restarts, serving after {slowest:?} at most");
    assert!(slowest < SERVES, "{slowest:?}");
    Ok(())
}

#[tokio::test]
async fn with_prefetch_every_copy_is_on_every_node_and_what_is_not_there_is_not_found() -> Result<()> {
    let copies = values((0..60).map(|number| format!("copied/{}/{number}", number % 7)));
    let options = Options::default().nodes(2);
    let mut synced = Synced::start(options, json!({ "prefetch": true }), &copies).await?;
    synced.prefetched().await?;
    for node in synced.nodes().await? {
        assert!(node["secrets"].as_u64() >= Some(copies.len() as u64), "{node}");
    }
    let never_asked = synced.planes.rest(1)?;
    is_known(&never_asked).await?;
    settle(&mut synced.planes.nodes[1]).await?;
    synced.prefetched().await?;

    synced.planes.control_plane.kill9();
    for start in 0..3 {
        if start > 0 {
            restart(&mut synced.planes.nodes[1], &never_asked, "copied/1/1").await?;
        }
        have(&never_asked, &copies).await?;
        for path in ["copied/none", "copied/1/none", "copied/1/1/none"] {
            let refused = never_asked.get(&url(path)).await?;
            assert_eq!(refused.refusal(), (404, "not_found"), "{start}: {path}: {}", refused.text);
        }
        let local = never_asked.get(&url("local/none")).await?;
        assert_eq!(local.refusal(), NO_CONTROL_PLANE, "nobody promised all of ours: {}", local.text);
    }
    Ok(())
}

#[tokio::test]
async fn the_status_tells_how_much_each_node_holds() -> Result<()> {
    let copies = values((0..10).map(|number| format!("copied/{number}")));
    let synced = Synced::start(Options::default().nodes(2), json!({}), &copies).await?;
    let rest = synced.planes.rest(0)?;
    let path = format!("/v1/federation/backends/{}", synced.backend);
    let held = async |expected: [u64; 2]| {
        wait::until(&format!("the nodes hold {expected:?}"), async || {
            let told = synced.nodes().await?;
            Ok(told.iter().map(|node| node["secrets"].as_u64()).eq(expected.map(Some)).then_some(()))
        })
        .await
    };
    held([0, 0]).await?;
    has(&rest, "copied/0", &copies["copied/0"]).await?;
    rest.put_data("local/one", json!({ "n": 1 })).await?;
    has(&rest, "local/one", &json!({ "n": 1 })).await?;
    held([2, 0]).await?;
    assert!(synced.nodes().await?.iter().all(|node| node["prefetched"] == false));
    synced.planes.rest(1)?.patch(&path, json!({ "prefetch": true })).await?.ok()?;
    held([11, 10]).await?;
    synced.prefetched().await
}

#[tokio::test]
async fn copies_and_tokens_are_trusted_offline_but_not_for_ever_nor_longer_after_a_restart() -> Result<()> {
    let longest = Duration::from_secs(2);
    let mut planes = Planes::start(Options::default().nodes(0)).await?;
    for (name, flag) in [("values", "--max-offline-values"), ("grants", "--max-offline")] {
        let index = planes.invite(name, &["*"]).await?;
        planes.nodes[index].add_flag(flag, "2s");
        planes.nodes[index].start_again().await?;
        planes.nodes[index].ready().await?;
    }
    let copies = values(["copied/x"]);
    let mapping = json!([
        { "pattern": "copied/**", "template": "secret/data/**" },
        { "pattern": "proxied/**", "template": "secret/data/**", "mode": "proxy" },
    ]);
    let mut synced = Synced::on(planes, json!({ "path_mapping": mapping }), &copies).await?;
    let rests = [synced.planes.rest(0)?, synced.planes.rest(1)?];
    rests[0].put_data("local/x", json!({ "n": 1 })).await?;
    for (rest, node) in rests.iter().zip(&mut synced.planes.nodes) {
        for path in ["copied/x", "local/x"] {
            rest.get(&url(path)).await?.ok()?;
        }
        settle(node).await?;
        rest.get(&url("proxied/x")).await?.ok()?;
    }

    let start = Instant::now();
    synced.planes.control_plane.kill9();
    let served = async |rest: &Rest| has(rest, "copied/x", &copies["copied/x"]).await;
    try_join_all(rests.iter().map(served)).await?;
    for rest in &rests {
        for path in ["copied/x", "local/x"] {
            let refused = wait::until("that has been for too long", async || {
                let answer = rest.get(&url(path)).await?;
                Ok((answer.status != 200).then_some(answer))
            })
            .await?;
            assert_eq!(refused.refusal(), OFFLINE_TOO_LONG, "{path}: {}", refused.text);
            assert_ne!(refused.header("retry-after"), "");
            assert!(start.elapsed() >= longest, "{:?}", start.elapsed());
        }
    }
    assert_eq!(rests[0].get(&url("proxied/x")).await?.status, 200, "tokens are trusted for longer");
    assert_eq!(rests[1].get(&url("proxied/x")).await?.refusal(), OFFLINE_TOO_LONG);

    for (rest, node) in rests.iter().zip(&mut synced.planes.nodes) {
        node.kill9();
        node.start_again().await?;
        for path in ["copied/x", "local/x"] {
            let refused = rest.get(&url(path)).await?;
            assert_eq!(refused.refusal(), OFFLINE_TOO_LONG, "{}: {path}: {}", node.name(), refused.text);
        }
    }
    synced.planes.control_plane.start_again().await?;
    try_join_all(rests.iter().map(|rest| has_soon(rest, &copies))).await.map(drop)
}

#[tokio::test]
async fn whoever_writes_through_a_node_reads_that_there_and_by_its_version_everywhere() -> Result<()> {
    let planes = Planes::start(Options::default().nodes(2)).await?;
    let rests = [planes.rest(0)?, planes.rest(1)?];
    let writers = (0..4).map(async |writer: usize| {
        let path = url(&format!("local/{writer}"));
        let (here, there) = (&rests[writer % 2], &rests[(writer + 1) % 2]);
        assert_eq!(here.get(&path).await?.status, 404);
        for round in 0..10 {
            let written = here.put(&path, json!({ "data": { "n": round } })).await?;
            assert_eq!(written.header("x-scaivault-pending"), "", "it did not wait in vain");
            let version = written.ok()?["version"].as_u64().context("version")?;
            let read = here.get(&path).await?.ok()?;
            assert_eq!((&read["version"], &read["data"]["n"]), (&json!(version), &json!(round)));
            let read = there.get(&format!("{path}?min_version={version}")).await?.ok()?;
            assert_eq!((&read["version"], &read["data"]["n"]), (&json!(version), &json!(round)));
            if round % 3 == 2 {
                assert_eq!(here.delete(&path).await?.status, 204);
                assert_eq!(here.get(&path).await?.status, 404, "round {round}");
                wait::until("it is gone there too", async || {
                    Ok((there.get(&path).await?.status == 404).then_some(()))
                })
                .await?;
            }
        }
        let none = here.get(&format!("{path}?min_version=1000")).await?;
        assert!(none.status >= 400, "{}", none.text);
        Ok::<_, anyhow::Error>(())
    });
    try_join_all(writers).await.map(drop)
}

#[tokio::test]
async fn what_was_revoked_or_deleted_is_so_on_every_node_at_once_and_after_a_restart() -> Result<()> {
    const AT_LATEST: Duration = Duration::from_secs(1);
    let copies = values(["copied/x"]);
    let mut synced = Synced::start(Options::default().nodes(3), json!({}), &copies).await?;
    let rests = (0..3).map(|index| synced.planes.rest(index)).collect::<Result<Vec<_>>>()?;
    let rules = json!([{ "path": "**", "capabilities": ["read"] }]);
    let mut slowest = Duration::ZERO;
    let mut last = None;
    for round in 0..5 {
        let issued = rests[0].issue(&format!("revoked-{round}"), &["secrets:read"], rules.clone()).await?;
        let revoked = rests.iter().map(|rest| rest.with_token(&issued.token)).collect::<Result<Vec<_>>>()?;
        for rest in &revoked {
            have(rest, &copies).await?;
        }
        let by = &rests[round % 3];
        by.delete(&format!("/v1/tokens/{}", issued.accessor)).await?.ok()?;
        let start = Instant::now();
        for rest in &revoked {
            wait::until("the token is refused", async || {
                Ok((rest.get(&url("copied/x")).await?.status == 401).then_some(()))
            })
            .await?;
        }
        slowest = slowest.max(start.elapsed());
        last = Some(revoked);
    }
    println!("refused on every node after {slowest:?} at most");
    assert!(slowest < AT_LATEST, "{slowest:?}");

    rests[0].put_data("local/x", json!({ "n": 1 })).await?;
    has(&rests[0], "local/x", &json!({ "n": 1 })).await?;
    assert_eq!(rests[0].delete(&url("local/x")).await?.status, 204);
    assert_eq!(rests[0].get(&url("local/x")).await?.status, 404);
    synced.planes.nodes[0].kill9();
    synced.planes.control_plane.kill9();
    synced.planes.nodes[0].start_again().await?;
    let revoked = &last.context("there were rounds")?[0];
    let refused = revoked.get(&url("copied/x")).await?;
    assert!([401, 503].contains(&refused.status), "{} {}", refused.status, refused.text);
    let deleted = rests[0].get(&url("local/x")).await?;
    assert!([404, 503].contains(&deleted.status), "{} {}", deleted.status, deleted.text);
    Ok(())
}

/// What becomes of the cache directory of a node that does not run.
#[derive(Clone, Copy, Debug)]
enum Damage {
    Flipped,
    Truncated,
    Emptied,
    AnotherVersion,
    Deleted,
    AFileInItsPlace,
    OfAnotherNode,
}

impl Damage {
    fn inflict(self, cache: &Path, another: &Path) -> Result<()> {
        match self {
            Damage::Flipped => each_file(cache, |file, length| {
                for _ in 0..(length / 512).clamp(4, 64) {
                    let at = rand::random_range(0..length);
                    let mut byte = [0];
                    file.seek(SeekFrom::Start(at))?;
                    file.read_exact(&mut byte)?;
                    file.seek(SeekFrom::Start(at))?;
                    file.write_all(&[byte[0] ^ rand::random_range(1..=255_u8)])?;
                }
                Ok(())
            }),
            Damage::Truncated => each_file(cache, |file, length| Ok(file.set_len(length / 2)?)),
            Damage::Emptied => each_file(cache, |file, _| Ok(file.set_len(0)?)),
            Damage::AnotherVersion => each_file(cache, |file, length| {
                let header = vec![b'?'; 64.min(usize::try_from(length)?)];
                Ok(file.write_all(&header)?)
            }),
            Damage::Deleted => Ok(fs::remove_dir_all(cache)?),
            Damage::AFileInItsPlace => {
                fs::remove_dir_all(cache)?;
                Ok(fs::write(cache, "no directory")?)
            }
            Damage::OfAnotherNode => {
                remove(cache)?;
                copy(another, cache)
            }
        }
    }
}

fn each_file(dir: &Path, mut change: impl FnMut(&mut File, u64) -> Result<()>) -> Result<()> {
    let mut any = false;
    for path in files_below(dir)? {
        let mut file = OpenOptions::new().read(true).write(true).open(&path)?;
        let length = file.metadata()?.len();
        if length > 0 {
            any = true;
            change(&mut file, length).with_context(|| path.display().to_string())?;
        }
    }
    ensure!(any, "there is nothing in {}", dir.display());
    Ok(())
}

/// What is in the directory, and beside it under its name, e.g. how it was left.
fn parts(cache: &Path) -> Result<Vec<PathBuf>> {
    let (node, name) = (cache.parent().context("a node's")?, cache.to_str().context("a name")?);
    let of_it = |path: &PathBuf| path.to_str().is_some_and(|path| path.starts_with(name));
    Ok(files_below(node)?.into_iter().filter(of_it).collect())
}

fn remove(cache: &Path) -> Result<()> {
    parts(cache)?.into_iter().try_for_each(fs::remove_file)?;
    Ok(fs::remove_dir_all(cache)?)
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let (from, to) = from.parent().zip(to.parent()).context("both are nodes'")?;
    for path in parts(&from.join(CACHE))? {
        let target = to.join(path.strip_prefix(from)?);
        fs::create_dir_all(target.parent().context("it is in a directory")?)?;
        fs::copy(&path, target)?;
    }
    Ok(())
}

/// The directory of the copies in that of a node.
const CACHE: &str = "cache";

fn cache_of(node: &Plane) -> PathBuf {
    node.dir().join(CACHE)
}

/// Copies of every size: such that are one row, several, or a file of their own.
fn small_and_large() -> Values {
    let mut values = values((0..20).map(|number| format!("copied/small/{number}")));
    for number in 0..8 {
        let value = json!({ "number": number, "large": "x".repeat(12_000 * (number + 1)) });
        values.insert(format!("copied/large/{number}"), value);
    }
    values
}

#[tokio::test]
async fn a_damaged_cache_gives_no_wrong_value_and_is_made_good_by_the_control_plane() -> Result<()> {
    let copies = small_and_large();
    let options = Options::default().nodes(2);
    let mut synced = Synced::start(options, json!({ "prefetch": true }), &copies).await?;
    let rest = synced.planes.rest(0)?;
    let another = cache_of(&synced.planes.nodes[1]);
    synced.prefetched().await?;
    have(&rest, &copies).await?;
    synced.planes.nodes[1].stop().await?;
    for damage in [
        Damage::Flipped,
        Damage::Truncated,
        Damage::Emptied,
        Damage::AnotherVersion,
        Damage::Deleted,
        Damage::AFileInItsPlace,
        Damage::OfAnotherNode,
        Damage::Flipped,
    ] {
        synced.planes.nodes[0].stop().await?;
        synced.planes.control_plane.kill9();
        damage.inflict(&cache_of(&synced.planes.nodes[0]), &another)?;
        synced.planes.nodes[0].start_again().await.with_context(|| format!("{damage:?}"))?;
        let still = served(&rest, &copies).await.with_context(|| format!("{damage:?}"))?;
        synced.planes.control_plane.start_again().await?;
        has_soon(&rest, &copies).await.with_context(|| format!("{damage:?}"))?;
        println!("{damage:?}: {still} of {} were served without the control plane", copies.len());

        // What was damaged does no harm to the next start either.
        is_linked(&rest).await?;
        wait::until("it holds everything again", async || {
            Ok((synced.nodes().await?[0]["prefetched"] == true).then_some(()))
        })
        .await?;
        synced.planes.nodes[0].stop().await?;
        synced.planes.control_plane.kill9();
        synced.planes.nodes[0].start_again().await?;
        have(&rest, &copies).await.with_context(|| format!("after {damage:?}"))?;
        synced.planes.control_plane.start_again().await?;
        is_linked(&rest).await?;
    }
    Ok(())
}

#[tokio::test]
async fn an_older_cache_that_was_put_back_catches_up() -> Result<()> {
    let before = small_and_large();
    let mut synced = Synced::start(Options::default(), json!({ "prefetch": true }), &before).await?;
    let (rest, folder) = (synced.planes.rest(0)?, tempfile::tempdir()?);
    let older = folder.path().join(CACHE);
    synced.prefetched().await?;
    synced.planes.nodes[0].stop().await?;
    let cache = cache_of(&synced.planes.nodes[0]);
    copy(&cache, &older)?;
    synced.planes.nodes[0].start_again().await?;

    let after = values(before.keys().cloned());
    put_upstream(&synced.bao.client()?, &after).await?;
    wait::until("the copies are new", async || Ok(have(&rest, &after).await.ok())).await?;
    synced.planes.nodes[0].stop().await?;
    remove(&cache)?;
    copy(&older, &cache)?;
    synced.planes.nodes[0].start_again().await?;
    is_linked(&rest).await?;
    wait::until("the copies are new again", async || Ok(have(&rest, &after).await.ok())).await
}

/// A file system of a test's own, gone when this is dropped.
struct Mount(PathBuf);

impl Mount {
    /// Fails where we may not mount.
    fn tmpfs(dir: &Path, size: &str) -> Result<Mount> {
        fs::create_dir_all(dir)?;
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"]).arg(dir);
        let mounted = mount.output()?;
        ensure!(mounted.status.success(), "{}", String::from_utf8_lossy(&mounted.stderr).trim());
        Ok(Mount(dir.to_owned()))
    }

    fn make_read_only(&self) -> Result<()> {
        let status = Command::new("mount").args(["-o", "remount,ro"]).arg(&self.0).status()?;
        ensure!(status.success(), "remount: {status}");
        Ok(())
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        drop(Command::new("umount").arg("--lazy").arg(&self.0).status());
    }
}

#[tokio::test]
async fn a_cache_without_room_or_that_cannot_be_written_is_replaced_by_memory() -> Result<()> {
    let mut planes = Planes::start(Options::default().nodes(0)).await?;
    planes.invite("node", &["*"]).await?;
    let cache = cache_of(&planes.nodes[0]);
    let mount = match Mount::tmpfs(&cache, "3m") {
        Ok(mount) => mount,
        Err(error) => {
            println!("SKIPPED, nothing can be mounted here: {error}");
            return Ok(());
        }
    };
    planes.nodes[0].start_again().await?;
    planes.nodes[0].ready().await?;

    // Twice what there is room for.
    let large = |number| (format!("copied/{number}"), json!({ "n": number, "large": "x".repeat(30_000) }));
    let copies: Values = (0..200).map(large).collect();
    let mut synced = Synced::on(planes, json!({ "prefetch": true }), &copies).await?;
    // Gone before the folder that it is in.
    let mount = mount;
    let rest = synced.planes.rest(0)?;
    synced.prefetched().await?;
    have(&rest, &copies).await?;
    let log = synced.planes.nodes[0].log()?;
    assert!(log.contains("the cache on disk failed"), "it had no room:\n{log}");

    // The next process finds no room either.
    synced.planes.nodes[0].kill9();
    synced.planes.nodes[0].start_again().await?;
    has_soon(&rest, &copies).await?;

    // And the one after it a disk that cannot be written.
    synced.planes.nodes[0].kill9();
    mount.make_read_only()?;
    synced.planes.nodes[0].start_again().await?;
    has_soon(&rest, &copies).await?;
    let log = synced.planes.nodes[0].log()?;
    assert!(log.contains("copies are kept in memory only"), "it was not written:\n{log}");
    let update = values(["copied/0"]);
    put_upstream(&synced.bao.client()?, &update).await?;
    wait::until("what is new comes too", async || Ok(have(&rest, &update).await.ok())).await?;

    synced.planes.nodes[0].stop().await?;
    drop(mount);
    synced.planes.nodes[0].start_again().await?;
    let copies = copies.into_iter().chain(update).collect();
    wait::until("the disk is used again", async || Ok(have(&rest, &copies).await.ok())).await?;
    settle(&mut synced.planes.nodes[0]).await?;
    synced.prefetched().await?;
    synced.planes.control_plane.kill9();
    restart(&mut synced.planes.nodes[0], &rest, "copied/0").await?;
    have(&rest, &copies).await
}

#[tokio::test]
async fn the_key_decides_whether_a_restarted_node_can_read_its_cache() -> Result<()> {
    let mut planes = Planes::start(Options::default().nodes(0)).await?;
    let keys = tempfile::tempdir()?;
    let (key, other) = (STANDARD.encode(rand::random::<[u8; 32]>()), STANDARD.encode([7; 32]));
    let file = keys.path().join("key");
    fs::write(&file, &key)?;
    let command = format!("command:cat {}", file.display());
    for (name, source) in [("memory", "memory"), ("variable", "env:NODE_KEY"), ("command", &command)] {
        let index = planes.invite(name, &["*"]).await?;
        planes.nodes[index].add_flag("--cache-key", source);
        planes.nodes[index].set_variable("NODE_KEY", &key);
        planes.nodes[index].start_again().await?;
        planes.nodes[index].ready().await?;
    }
    let copies = values(["copied/x", "copied/y"]);
    let mut synced = Synced::on(planes, json!({ "prefetch": true }), &copies).await?;
    synced.prefetched().await?;
    let rests = (0..3).map(|index| synced.planes.rest(index)).collect::<Result<Vec<_>>>()?;
    try_join_all(rests.iter().map(is_known)).await?;
    for node in &mut synced.planes.nodes {
        node.stop().await?;
    }

    synced.planes.control_plane.kill9();
    for (index, rest) in rests.iter().enumerate() {
        synced.planes.nodes[index].start_again().await?;
        let expected = if index == 0 { 0 } else { copies.len() };
        assert_eq!(served(rest, &copies).await?, expected, "{}", synced.planes.nodes[index].name());
    }
    synced.planes.control_plane.start_again().await?;
    try_join_all(rests.iter().map(|rest| has_soon(rest, &copies))).await?;

    for node in &mut synced.planes.nodes {
        node.kill9();
    }
    let variable = &mut synced.planes.nodes[1];
    variable.set_variable("NODE_KEY", &other);
    let refused = variable.start_again().await.expect_err("it is another key");
    assert!(refused.to_string().contains("use the key that it was made with"), "{refused}");
    fs::remove_file(file)?;
    let refused = synced.planes.nodes[2].start_again().await.expect_err("there is no key");
    assert!(refused.to_string().contains("gave no key"), "{refused}");
    Ok(())
}

#[tokio::test]
async fn a_stolen_disk_of_a_node_tells_neither_values_nor_paths() -> Result<()> {
    let mut needles = Needles::default();
    needles.add("a canary", BIRD);
    let value = |size: usize| json!({ "password": BIRD, BIRD: BIRD.repeat(size) });
    let copies: Values = [1, 100, 1000, 10_000]
        .map(|size| (format!("copied/{BIRD}/{size}/{BIRD}"), value(size)))
        .into_iter()
        .collect();
    let options = Options::default().nodes(2);
    let mut synced = Synced::start(options, json!({ "prefetch": true }), &copies).await?;
    needles.add("the operator token", synced.planes.operator_token());
    synced.prefetched().await?;
    let local = format!("local/{BIRD}");
    for index in 0..2 {
        let rest = synced.planes.rest(index)?;
        have(&rest, &copies).await?;
        rest.put_data(&local, value(1)).await?;
        has(&rest, &local, &value(1)).await?;
        let rules = json!([{ "path": format!("{BIRD}/**"), "capabilities": ["read"] }]);
        let issued = rest.issue(&format!("thief-{index}"), &["secrets:read"], rules).await?;
        needles.add("a token", &issued.token);
        assert_eq!(rest.with_token(&issued.token)?.get(&url(&local)).await?.status, 403);
        rest.delete(&url(&local)).await?;
    }
    // One as a power loss leaves it, one as a shutdown does.
    synced.planes.nodes[0].kill9();
    synced.planes.nodes[1].stop().await?;
    for node in &synced.planes.nodes {
        let mut searched = 0;
        for file in files_below(node.dir())? {
            let name = file.display().to_string();
            let bytes = fs::read(&file)?;
            searched += bytes.len();
            needles.assert_absent("the name of a file", &name);
            needles.assert_absent(&name, &String::from_utf8_lossy(&bytes));
        }
        assert!(searched > 1 << 16, "{}: {searched} bytes", node.name());
    }
    Ok(())
}
