use std::collections::BTreeSet;
use std::net::TcpListener;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use rand::RngExt as _;
use reqwest::header::HeaderMap;
use scaivault_domain::backend::{Tls, VaultTarget};

use super::*;
use crate::budget::Cost;
use crate::error::Class;
use crate::guard::{BreakerState, Guard, Limits, Retry};
use crate::testing::lease;
use crate::{SecretBackend as _, VaultBackend, client};

/// Ways to write an address of the own machine that reach a listener on 127.0.0.1. `{P}` is its port.
const REACHING: &[&str] = &[
    "http://127.0.0.1:{P}",
    "http://127.1:{P}",
    "http://127.0.1:{P}",
    "http://2130706433:{P}",
    "http://0x7f000001:{P}",
    "http://0X7F000001:{P}",
    "http://0x7f.1:{P}",
    "http://0x7f.0.1:{P}",
    "http://0x7f.0x0.0x0.0x1:{P}",
    "http://0x7f.0.0.1:{P}",
    "http://0x07f.0.0.1:{P}",
    "http://0x0000007f.0.0.1:{P}",
    "http://0177.0.0.1:{P}",
    "http://0177.1:{P}",
    "http://017700000001:{P}",
    "http://0000177.0.0.01:{P}",
    "http://0177.0x0.0.1:{P}",
    "http://127.0x0.00.1:{P}",
    "http://127.0x1:{P}",
    "http://127.0x.0.1:{P}",
    "http://127.0.0.1.:{P}",
    "http://127.1.:{P}",
    "http://2130706433.:{P}",
    "http://0x7f000001.:{P}",
    "http://017700000001.:{P}",
    "http://%31%32%37.0.0.1:{P}",
    "http://127%2e0%2e0%2e1:{P}",
    "http://127%2E0.0%2E1:{P}",
    "http://%31%32%37%2e%30%2e%30%2e%31:{P}",
    "http://%30x7f.1:{P}",
    "http://１２７.0.0.1:{P}",
    "http://127.0.0.１:{P}",
    "http://０ｘ７ｆ.1:{P}",
    "http://127。0。0。1:{P}",
    "http://127．0．0．1:{P}",
    "http://127｡0｡0｡1:{P}",
    "http://①②⑦.⓪.⓪.①:{P}",
    "http://𝟏𝟐𝟕.𝟎.𝟎.𝟏:{P}",
    "http://¹²⁷.0.0.1:{P}",
    "http://127.0.0.%EF%BC%91:{P}",
    "http://12\u{ad}7.0.0.1:{P}",
    "http://127\u{200b}.0.0.1:{P}",
    "HTTP://127.0.0.1:{P}",
    "hTtP://127.0.0.1:{P}/",
    "http:127.0.0.1:{P}",
    "http:/127.0.0.1:{P}",
    "http:///127.0.0.1:{P}",
    "http:////127.0.0.1:{P}",
    r"http:\\127.0.0.1:{P}",
    r"http:/\127.0.0.1:{P}",
    " http://127.0.0.1:{P} ",
    "\u{1}http://127.0.0.1:{P}",
    "ht\ntp://127.0.0.1:{P}",
    "http://127.0.\t0.1:{P}",
    "http://127.0.0.1\r:{P}",
    "http://127.0.0.1:0{P}",
    "http://127.0.0.1:0000{P}",
    "http://127.0.0.1:{P}/v1/../..",
    "http://127.0.0.1:{P}//public.example/",
    "http://127.0.0.1:{P}/@public.example",
    r"http://127.0.0.1:{P}\@public.example",
    "http://@127.0.0.1:{P}",
    "http://:@127.0.0.1:{P}",
    "http://0:{P}",
    "http://0.0.0.0:{P}",
    "http://0x0:{P}",
    "http://00:{P}",
    "http://0.:{P}",
    "http://[::ffff:127.0.0.1]:{P}",
    "http://[::FFFF:7F00:1]:{P}",
    "http://[0:0:0:0:0:ffff:127.0.0.1]:{P}",
    "http://[0000:0000:0000:0000:0000:ffff:7f00:0001]:{P}",
    "http://localhost:{P}",
    "http://LOCALHOST:{P}",
    "http://LocalHost:{P}/vault",
    "http://loc%61lhost:{P}",
    "http://ｌｏｃａｌｈｏｓｔ:{P}",
    "http://loc\u{ad}alhost:{P}",
    "http://ⓛⓞⓒⓐⓛⓗⓞⓢⓣ:{P}",
    "http://inner.example:{P}",
    "http://INNER.example.:{P}",
    "http://inner。example:{P}",
    "http://127.0.0.1.inner.example:{P}",
    "http://1.2.3.4.inner.example:{P}",
    "http://a_b.inner.example:{P}",
    "http://xn--bcher-kva.example:{P}",
    "http://bücher.example:{P}",
];

/// Other ways to try, whether they lead anywhere or not.
const TRYING: &[&str] = &[
    "http://127.0.0.2:{P}",
    "http://127.127.127.127:{P}",
    "http://127.255.255.255:{P}",
    "http://0.1.2.3:{P}",
    "http://[::1]:{P}",
    "http://[0:0:0:0:0:0:0:1]:{P}",
    "http://[0000:0000:0000:0000:0000:0000:0000:0001]:{P}",
    "http://[::0.0.0.1]:{P}",
    "http://[::]:{P}",
    "http://[::ffff:0.0.0.0]:{P}",
    "http://[::127.0.0.1]:{P}",
    "http://[::7f00:1]:{P}",
    "http://[::ffff:0:127.0.0.1]:{P}",
    "http://[64:ff9b::127.0.0.1]:{P}",
    "http://[64:ff9b::7f00:1]:{P}",
    "http://[64:ff9b:1::127.0.0.1]:{P}",
    "http://[64:ff9b:1:7f00:0:100::]:{P}",
    "http://[2002:7f00:1::]:{P}",
    "http://[2002:7f00:1::1]:{P}",
    "http://[2001:0:7f00:1::]:{P}",
    "http://[2001:0:4136:e378:8000:63bf:80ff:fffe]:{P}",
    "http://[2a00:1450:1::5efe:127.0.0.1]:{P}",
    "http://[2a00:1450:1::200:5efe:7f00:1]:{P}",
    "http://[fd12::5efe:127.0.0.1]:{P}",
    "http://[fe80::1]:{P}",
    "http://[fe80::1%25lo]:{P}",
    "http://[fe80::1%lo]:{P}",
    "http://[::1%25lo]:{P}",
    "http://[febf::1]:{P}",
    "http://[fec0::1]:{P}",
    "http://[ff02::1]:{P}",
    "http://[100::1]:{P}",
    "http://[2001:db8::1]:{P}",
    "http://[2001:2::1]:{P}",
    "http://[3fff::1]:{P}",
    "http://169.254.169.254",
    "http://169.254.169.254.",
    "http://169.254.43518",
    "http://2852039166",
    "http://0xa9fea9fe",
    "http://0xA9.0xFE.0xA9.0xFE",
    "http://0251.0376.0251.0376",
    "http://１６９。２５４。１６９。２５４",
    "http://[::ffff:169.254.169.254]",
    "http://[::ffff:a9fe:a9fe]",
    "http://[64:ff9b::a9fe:a9fe]",
    "http://[2002:a9fe:a9fe::]",
    "http://169.254.170.2/v2/credentials",
    "http://169.254.0.1",
    "http://100.100.100.200",
    "http://168.63.129.16",
    "http://192.0.0.192",
    "http://[fd00:ec2::254]",
    "http://[fd00:ec2::23]",
    "http://[fd20:ce::254]",
    "http://224.0.0.1",
    "http://239.255.255.250",
    "http://240.0.0.1",
    "http://255.255.255.255",
    "http://192.0.2.1",
    "http://198.18.0.1",
    "http://198.51.100.1",
    "http://203.0.113.1",
    "http://192.88.99.1",
    "https://127.0.0.1:{P}",
    "https://2130706433:{P}",
    "https://[::1]:{P}",
    "https://localhost:{P}",
    "https://inner.example",
    "https://169.254.169.254",
    "http://localhost.:{P}",
    "http://sub.localhost:{P}",
    "http://localhost%2e:{P}",
    "http://localhost.localdomain:{P}",
    "http://metadata.google.internal",
    "http://public.example@127.0.0.1:{P}",
    "http://public.example:80@127.0.0.1:{P}",
    "http://127.0.0.1:{P}@public.example:{P}",
    "http://public.example%40127.0.0.1:{P}",
    "http://public.example#@127.0.0.1:{P}",
    "http://public.example?@127.0.0.1:{P}",
    r"http://public.example\@127.0.0.1:{P}",
    "http://public.example:{P}/@127.0.0.1",
    "http://127.0.0.1:{P}#public.example",
    "http://127.0.0.1:{P}?public.example",
    "http://127.0.0.1%00.public.example:{P}",
    "http://127.0.0.1%0a.public.example:{P}",
    "http://127.0.0.1%2f.public.example:{P}",
    "http://127.0.0.1 .public.example:{P}",
    "http://256.0.0.1:{P}",
    "http://127.0.0.1.1:{P}",
    "http://127..1:{P}",
    "http://.127.0.0.1:{P}",
    "http://4294967296:{P}",
    "http://0x7g.1:{P}",
    "http://127.0.0.1:65536",
    "http://127.0.0.1:-1",
    "http://127.0.0.1:{P}x",
    "http://[127.0.0.1]:{P}",
    "http://[::1:{P}",
    "http://::1:{P}",
    "//127.0.0.1:{P}",
    "127.0.0.1:{P}",
    "localhost:{P}",
    "ftp://127.0.0.1:{P}",
    "gopher://127.0.0.1:{P}/_x",
    "file:///etc/passwd",
    "unix:///run/docker.sock",
    "ws://127.0.0.1:{P}",
    "data:,x",
    "javascript:alert(1)",
];

/// Names that lead to these addresses, another list for each time that they are asked for; the last one stays.
struct Names {
    answers: Mutex<Vec<Vec<IpAddr>>>,
    asked: AtomicUsize,
}

impl Names {
    fn leading(answers: &[&[&str]]) -> Arc<Self> {
        let parse = |list: &&[&str]| list.iter().map(|ip| ip.parse().expect("an address")).collect();
        let answers = answers.iter().rev().map(parse).collect();
        Arc::new(Names { answers: Mutex::new(answers), asked: AtomicUsize::new(0) })
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::Relaxed)
    }
}

impl Resolve for Names {
    fn resolve(&self, _: Name) -> Resolving {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let mut answers = self.answers.lock().expect("no test panicked with it");
        let answer = if answers.len() > 1 { answers.pop() } else { answers.last().cloned() };
        // A port of their own, which must not count.
        let answer: Vec<_> = answer.into_iter().flatten().map(|ip| SocketAddr::new(ip, 1)).collect();
        Box::pin(std::future::ready(Ok(Box::new(answer.into_iter()) as Addrs)))
    }
}

/// A server on 127.0.0.1 that nobody must reach.
struct Forbidden(TcpListener);

impl Forbidden {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has free ports");
        listener.set_nonblocking(true).expect("it is a socket");
        Forbidden(listener)
    }

    fn port(&self) -> u16 {
        self.0.local_addr().expect("it is bound").port()
    }

    /// How many connections came since this was last asked.
    fn connections(&self) -> usize {
        std::iter::from_fn(|| self.0.accept().ok()).count()
    }
}

/// What becomes of a request to `form`; `None` if it is no endpoint.
async fn request(form: &str, port: u16, egress: &Egress) -> Option<Result<(), BackendError>> {
    let endpoint = Endpoint::parse("endpoint", &form.replace("{P}", &port.to_string())).ok()?;
    let client = match client(&endpoint, &Tls::default(), HeaderMap::new(), egress) {
        Ok(client) => client,
        Err(error) => return Some(Err(error)),
    };
    Some(match client.get(format!("{endpoint}/v1/x")).timeout(PATIENCE).send().await {
        Ok(_) => Ok(()),
        Err(error) => match refusal_in(&error) {
            Some(refusal) => Err(refusal.into()),
            None => Err(BackendError::Unreachable("not refused")),
        },
    })
}

/// For a connection that should not have come about: nobody answers.
const PATIENCE: Duration = Duration::from_secs(5);

fn allowing(entries: &[&str]) -> Policy {
    let entries: Vec<String> = entries.iter().map(|&entry| entry.to_owned()).collect();
    Policy::of_settings(&entries, Private::Allowed).expect("entries")
}

fn refused(refusal: Refusal) -> Option<Result<(), BackendError>> {
    Some(Err(refusal.into()))
}

#[tokio::test]
async fn no_spelling_of_an_endpoint_reaches_a_refused_address() {
    let forms: BTreeSet<_> = REACHING.iter().chain(TRYING).collect();
    assert!(forms.len() == REACHING.len() + TRYING.len() && forms.len() >= 120, "{}", forms.len());
    let server = Forbidden::start();
    let (mut refused, mut no_endpoints) = (0, 0);
    for answers in
        [&["127.0.0.1"][..], &["::ffff:127.0.0.1"], &["1.1.1.1", "127.0.0.1"], &["127.0.0.1", "1.1.1.1"]]
    {
        let egress = Egress::with_names(Policy::default(), Names::leading(&[answers]));
        for form in &forms {
            match request(form, server.port(), &egress).await {
                None => no_endpoints += 1,
                Some(Err(BackendError::EndpointRefused(_))) => refused += 1,
                outcome => panic!("{form}: {outcome:?}"),
            }
            assert_eq!(server.connections(), 0, "{form}");
        }
    }
    println!("{} forms: {refused} refused, {no_endpoints} no endpoint", forms.len());
}

/// Whether a request to `form` comes to `server`; it is over then.
async fn arrives(form: &str, server: &tokio::net::TcpListener, egress: &Egress) -> bool {
    let port = server.local_addr().expect("it is bound").port();
    tokio::select! {
        accepted = server.accept() => accepted.is_ok(),
        _ = request(form, port, egress) => false,
    }
}

#[tokio::test]
async fn the_spellings_do_lead_there_where_the_operator_allows_it() {
    let server = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let names = Names::leading(&[&["127.0.0.1"]]);
    let egress = Egress::with_names(allowing(&["0.0.0.0/0"]), names);
    for form in REACHING {
        assert!(arrives(form, &server, &egress).await, "{form} tests nothing");
    }
}

#[tokio::test]
async fn the_systems_own_names_are_refused_too() {
    let server = Forbidden::start();
    for form in ["http://localhost:{P}", "http://LOCALHOST:{P}/", "https://localhost:{P}"] {
        assert_eq!(
            request(form, server.port(), &Egress::default()).await,
            refused(Refusal::Loopback),
            "{form}"
        );
    }
    assert_eq!(server.connections(), 0);
}

#[tokio::test]
async fn a_name_that_changes_its_answer_gains_nothing() {
    let server = Forbidden::start();
    let names = Names::leading(&[&["1.1.1.1"], &["127.0.0.1"]]);
    let egress = Egress::with_names(Policy::default(), names.clone());
    let endpoint = Endpoint::parse("endpoint", &format!("http://vault.example:{}", server.port())).unwrap();
    assert_eq!(egress.check_resolved(&endpoint).await, Ok(()));
    let form = "http://vault.example:{P}";
    assert_eq!(request(form, server.port(), &egress).await, refused(Refusal::Loopback));
    assert_eq!((server.connections(), names.asked()), (0, 2));
}

#[tokio::test]
async fn what_was_checked_is_what_is_connected_to() {
    let server = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    // Were it asked again, it would lead to where nothing may.
    let names = Names::leading(&[&["127.0.0.1"], &["169.254.169.254"]]);
    let egress = Egress::with_names(Policy::default().with_loopback(), names.clone());
    assert!(arrives("http://vault.example:{P}", &server, &egress).await);
    assert_eq!(names.asked(), 1);
}

#[tokio::test]
async fn a_client_resolves_no_name_but_that_of_its_endpoint() {
    let egress = Egress::with_names(Policy::default().with_loopback(), Names::leading(&[&["127.0.0.1"]]));
    for endpoint in ["http://vault.example", "http://127.0.0.1", "http://[::1]"] {
        let endpoint = Endpoint::parse("endpoint", endpoint).unwrap();
        let client = client(&endpoint, &Tls::default(), HeaderMap::new(), &egress).unwrap();
        let error = client.get("http://other.example").send().await.unwrap_err();
        assert_eq!(refusal_in(&error), Some(Refusal::Elsewhere));
    }
}

#[tokio::test]
async fn configurations_are_told_what_their_names_lead_to() {
    let check = async |text: &str, answers: &[&[&str]]| {
        let egress = Egress::with_names(Policy::default(), Names::leading(answers));
        egress.check_resolved(&Endpoint::parse("endpoint", text).unwrap()).await
    };
    assert_eq!(check("https://a.example", &[&["10.0.0.1", "fd12::1"]]).await, Ok(()));
    assert_eq!(check("https://a.example", &[&["1.1.1.1", "::1"]]).await, Err(Refusal::Loopback.into()));
    assert_eq!(check("https://a.example", &[&["fd00:ec2::254"]]).await, Err(Refusal::Metadata.into()));
    assert_eq!(check("https://127.1", &[&["1.1.1.1"]]).await, Err(Refusal::Loopback.into()));
    assert_eq!(check("https://a.example", &[&[]]).await, Ok(()), "it may resolve later");
    let nowhere = Endpoint::parse("endpoint", "https://does-not-exist.invalid").unwrap();
    assert_eq!(Egress::default().check_resolved(&nowhere).await, Ok(()));
}

#[test]
fn a_refusal_tells_what_to_do_and_is_no_outage() {
    let error = BackendError::from(Refusal::LinkLocal);
    assert_eq!(error.class(), Class::Invalid);
    assert!(!error.is_outage() && error.is_refusal());
    assert!(error.to_string().contains("a link-local address"));
    assert!(error.hint().unwrap().contains("--egress-allow"));
}

#[tokio::test]
async fn a_refused_endpoint_is_neither_tried_again_nor_given_up() {
    let names = Names::leading(&[&["127.0.0.1"]]);
    let egress = Egress::with_names(Policy::default(), names.clone());
    let target = VaultTarget {
        endpoint: Endpoint::parse("endpoint", "http://vault.example:1").unwrap(),
        namespace: None,
        tls: Tls::default(),
        kv: None,
    };
    let vault = VaultBackend::connect(&target, &egress).unwrap();
    let guard = Guard::new(Limits::default());
    for _ in 0..20 {
        let probed = guard
            .call(Retry::PROXIED_READ, Cost::FREE, PATIENCE, async || vault.probe(&lease("t")).await)
            .await;
        assert_eq!(probed, Err(Refusal::Loopback.into()));
    }
    assert_eq!((guard.state(), names.asked()), (BreakerState::Closed, 20));
    let literal = VaultTarget { endpoint: Endpoint::parse("endpoint", "http://127.1").unwrap(), ..target };
    assert_eq!(VaultBackend::connect(&literal, &egress).err(), Some(Refusal::Loopback.into()));
}

fn check(policy: &Policy, host: &str, ip: &str, port: u16) -> Result<(), Refusal> {
    Egress::new(policy.clone()).check_address(host, ip.parse().expect(ip), port)
}

#[test]
fn every_special_range_is_known_to_its_edges() {
    let policy = Policy::default();
    let table: &[(Result<(), Refusal>, &[&str])] = &[
        (Err(Refusal::Loopback), &["127.0.0.0", "127.255.255.255", "::1", "::ffff:127.0.0.1"]),
        (Err(Refusal::LinkLocal), &["169.254.0.0", "169.254.255.255", "fe80::", "febf:ffff::"]),
        (Err(Refusal::Metadata), &["169.254.169.254", "169.254.170.2", "169.254.170.23", "100.100.100.200"]),
        (Err(Refusal::Metadata), &["168.63.129.16", "192.0.0.192", "fd00:ec2::254", "fd20:ce::254"]),
        (Err(Refusal::Metadata), &["fd00:c1::a9fe:a9fe", "fd00:42::42", "::ffff:169.254.169.254"]),
        (Err(Refusal::Unspecified), &["0.0.0.0", "0.255.255.255", "::", "::ffff:0.0.0.0"]),
        (Err(Refusal::Multicast), &["224.0.0.0", "239.255.255.255", "ff00::", "ff02::fb"]),
        (Err(Refusal::Reserved), &["240.0.0.0", "255.255.255.255", "192.0.0.1", "192.0.2.9", "198.18.0.0"]),
        (Err(Refusal::Reserved), &["198.19.255.255", "198.51.100.0", "203.0.113.255", "192.88.99.1"]),
        (Err(Refusal::Reserved), &["::2", "::1.1.1.1", "::ffff:0:1.1.1.1", "64:ff9b:1::1.1.1.1", "100::1"]),
        (Err(Refusal::Reserved), &["2001:1::1", "2001:1ff::", "2001:db8::1", "3fff::1", "fec0::1", "4000::"]),
        (Ok(()), &["10.0.0.0", "10.255.255.255", "172.16.0.0", "172.31.255.255", "192.168.0.1"]),
        (Ok(()), &["100.64.0.0", "100.127.255.255", "fc00::1", "fdff:ffff::", "::ffff:10.0.0.1"]),
        (
            Ok(()),
            &["1.1.1.1", "9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0", "126.255.255.255"],
        ),
        (Ok(()), &["128.0.0.0", "169.253.255.255", "169.255.0.0", "172.15.255.255", "172.32.0.0"]),
        (Ok(()), &["192.0.1.0", "198.17.255.255", "198.20.0.0", "223.255.255.255", "168.63.129.17"]),
        (Ok(()), &["2000::1", "2001:200::", "2606:4700::1111", "64:ff9b::1.1.1.1", "2002:101:101::1"]),
    ];
    for (expected, addresses) in table {
        for ip in *addresses {
            assert_eq!(check(&policy, "h", ip, 443), *expected, "{ip}");
        }
    }
}

#[test]
fn an_ipv6_address_is_no_better_than_the_ipv4_address_in_it() {
    let (mut random, egress) =
        (rand::rng(), Egress::new(Policy { private: Private::Refused, ..Policy::default() }));
    let refused = |ip: IpAddr| egress.check_address("h", ip, 443).is_err();
    for round in 0..20_000 {
        let special =
            [127 << 24, 10 << 24, 0xa9fe_a9fe, 0, 0xc0a8_0000, 0xe000_0000, 0xac10_0000, 0x6440_0000];
        let bits = if round % 2 == 0 {
            special[round / 2 % 8] | random.random_range(0..256)
        } else {
            random.random()
        };
        let v4 = Ipv4Addr::from_bits(bits);
        let [a, b] = [(bits >> 16) as u16, bits as u16];
        assert_eq!(refused(v4.to_ipv6_mapped().into()), refused(v4.into()), "{v4}");
        for carrier in [
            [0x64, 0xff9b, 0, 0, 0, 0, a, b],
            [0x2002, a, b, random.random(), 0, 0, 0, 1],
            [0x2001, 0, a, b, 0, 0, 0xfefe, 0xfefe],
            [0x2001, 0, 0x101, 0x101, 0, random.random(), !a, !b],
            [0x2a00, 0x1450, random.random(), 1, 0x200, 0x5efe, a, b],
        ] {
            assert_eq!(refused(Ipv6Addr::from(carrier).into()), refused(v4.into()), "{v4} in {carrier:x?}");
        }
        assert!(refused(v4.to_ipv6_compatible().into()), "{v4}");
    }
}

#[test]
fn private_addresses_can_be_denied() {
    let policy = Policy { private: Private::Refused, ..allowing(&["10.1.0.0/16", "*.corp.example"]) };
    for ip in [
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "100.64.0.1",
        "fd12::1",
        "64:ff9b::10.1.0.1",
        "::ffff:10.0.0.1",
    ] {
        assert_eq!(check(&policy, "h", ip, 443), Err(Refusal::Private), "{ip}");
        assert_eq!(check(&policy, "vault.corp.example", ip, 443), Ok(()), "{ip}");
    }
    for ip in ["10.1.2.3", "::ffff:10.1.2.3", "1.1.1.1"] {
        assert_eq!(check(&policy, "h", ip, 443), Ok(()), "{ip}");
    }
}

#[test]
fn an_entry_allows_what_it_names_and_nothing_else() {
    let yes = [
        ("127.0.0.1", "h", "127.0.0.1"),
        ("127.0.0.1", "h", "::ffff:127.0.0.1"),
        ("::ffff:127.0.0.1", "h", "127.0.0.1"),
        ("127.0.0.1:443", "h", "127.0.0.1"),
        ("127.0.0.0/8", "h", "127.9.9.9"),
        ("127.0.0.0/8:443", "h", "127.9.9.9"),
        ("0.0.0.0/0", "h", "127.9.9.9"),
        ("::1", "h", "::1"),
        ("[::1]:443", "h", "::1"),
        ("[::1]", "h", "::1"),
        ("fe80::/10", "h", "fe80::7"),
        ("[fe80::/10]:443", "h", "fe80::7"),
        ("::/0", "h", "::1"),
        ("169.254.169.254", "h", "169.254.169.254"),
        ("169.254.169.254/32", "h", "169.254.169.254"),
        ("64:ff9b::7f00:1", "h", "64:ff9b::7f00:1"),
        ("vault.local", "vault.local", "127.0.0.1"),
        ("Vault.Local.", "vault.local.", "::1"),
        ("vault.local:443", "vault.local", "fe80::1"),
        ("*.local", "a.vault.local", "127.0.0.1"),
        ("BÜCHER.example", "xn--bcher-kva.example", "127.0.0.1"),
    ];
    for (entry, host, ip) in yes {
        assert_eq!(check(&allowing(&[entry]), host, ip, 443), Ok(()), "{entry}");
    }
    let no = [
        ("127.0.0.1", "h", "127.0.0.2"),
        ("127.0.0.1:8200", "h", "127.0.0.1"),
        ("127.0.0.1", "localhost", "::1"),
        ("127.0.0.1", "h", "64:ff9b::7f00:1"),
        ("::1", "h", "127.0.0.1"),
        ("::/0", "h", "127.0.0.1"),
        ("127.0.0.0/9", "h", "127.128.0.0"),
        ("vault.local", "a.vault.local", "127.0.0.1"),
        ("vault.local", "vault.local.evil.example", "127.0.0.1"),
        ("vault.local:8200", "vault.local", "127.0.0.1"),
        ("*.local", "local", "127.0.0.1"),
        ("*.local", "xlocal", "127.0.0.1"),
        ("vault.local", "vault.local", "169.254.169.254"),
        ("*.internal", "metadata.google.internal", "169.254.169.254"),
        ("169.254.0.0/16", "h", "169.254.169.254"),
        ("::/0", "h", "fd00:ec2::254"),
    ];
    for (entry, host, ip) in no {
        assert!(check(&allowing(&[entry]), host, ip, 443).is_err(), "{entry}");
    }
}

#[test]
fn entries_that_mean_nothing_are_refused_by_name() {
    for entry in [
        "",
        "*",
        "*.",
        ".",
        "127.1",
        "2130706433",
        "0x7f.1",
        "10.0.0.1/8",
        "10.0.0.0/33",
        "10.0.0.0/",
        "a/8",
        "::/129",
        "::ffff:10.0.0.0/104",
        "a:0",
        "a:65536",
        "a:b",
        "a:",
        "[::1",
        "[::1]443",
        "[::1]:",
        "https://a",
        "a b",
        "a@b",
        "*.*.a",
        "a*",
        "%61",
        "a/b",
        "a,b",
    ] {
        let error = entry.parse::<Entry>().expect_err(entry);
        assert!(error.to_string().starts_with(&format!("`{entry}`: ")), "{error}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_lookup_without_an_end_keeps_its_place_and_others_do_not_wait_for_it_for_long() {
    static PLACES: Semaphore = Semaphore::const_new(1);
    let (end, ended) = std::sync::mpsc::channel::<()>();
    let mut silent = Box::pin(look_up(&PLACES, move || Ok(ended.recv().is_err())));
    assert!(futures::poll!(&mut silent).is_pending());
    drop(silent);
    let refused = tokio::spawn(look_up(&PLACES, || Ok(())));
    // A thread of the pool keeps paused time from moving by itself.
    tokio::time::advance(Duration::ZERO).await;
    tokio::task::yield_now().await;
    tokio::time::advance(LOOKUP_WAITS).await;
    assert!(refused.await.expect("no panic").is_err(), "whoever asked has gone, but the thread has not");
    drop(end);
    look_up(&PLACES, || Ok(())).await.expect("the place is free again");
}
