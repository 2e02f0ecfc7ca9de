//! Which addresses may be connected to on behalf of a tenant.
//!
//! Whoever configures a backend chooses an endpoint, and with it where this process connects to. An [`Egress`] keeps
//! that from being a way to what only this process can reach: its own loopback, the metadata service of its machine,
//! its link. It decides when a connection is made and about the address that is connected to, so a name that changes
//! its answer between the check and the connection gains nothing.
//!
//! How every way into a connection is covered, by the source of `reqwest` 0.13 and `hyper-util` 0.1:
//!
//! * The URL parser turns every spelling of an IPv4 address (`127.1`, `0x7f.1`, `2130706433`, full-width digits,
//!   percent-encoding, a dot at the end) into the plain one, or takes none of it.
//! * A host that is an address never reaches a resolver. The connector takes it as it is, so it is checked when a
//!   client is made ([`Egress::check_endpoint`]), by the same test that the connector makes.
//! * Any other host, `localhost` and names with a dot at the end included, goes to the [`Resolve`] of
//!   a client. What that gives is what is connected to: nothing is looked up twice.
//! * A client has no proxy and follows no redirect (see `http`), and its resolver knows the endpoint's host only.

use std::error::Error;
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs as _};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use reqwest::Url;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use scaivault_domain::backend::Endpoint;
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use crate::error::BackendError;

/// How long a name may take to resolve when a configuration is checked. One that takes longer is checked when it is
/// connected to.
const RESOLVING: Duration = Duration::from_secs(3);

/// Why an address may not be connected to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// The process's own machine.
    Loopback,
    /// The link: 169.254.0.0/16, fe80::/10.
    LinkLocal,
    /// A metadata or host service of a cloud, which gives credentials to whoever can reach it.
    Metadata,
    /// RFC 1918, RFC 6598 and unique local addresses, where the operator denies them.
    Private,
    /// 0.0.0.0/8 and `::`, which many systems take for loopback.
    Unspecified,
    /// Groups.
    Multicast,
    /// What no server of the internet has: broadcast, documentation, benchmarks, protocols, what is not assigned.
    Reserved,
    /// Another host than the endpoint that the client was made for.
    Elsewhere,
}

impl Refusal {
    /// What is refused, as part of a sentence.
    pub fn as_str(self) -> &'static str {
        match self {
            Refusal::Loopback => "a loopback address",
            Refusal::LinkLocal => "a link-local address",
            Refusal::Metadata => "the address of a metadata service",
            Refusal::Private => "a private address",
            Refusal::Unspecified => "an unspecified address",
            Refusal::Multicast => "a multicast address",
            Refusal::Reserved => "a reserved address",
            Refusal::Elsewhere => "a host other than the endpoint",
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the egress filter refuses {}", self.as_str())
    }
}

impl Error for Refusal {}

impl From<Refusal> for BackendError {
    fn from(refusal: Refusal) -> BackendError {
        BackendError::EndpointRefused(refusal.as_str())
    }
}

/// What becomes of private addresses: 10/8, 172.16/12, 192.168/16, 100.64/10, fc00::/7.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Private {
    /// They may be connected to: that is where stores are.
    #[default]
    Allowed,
    /// Only where an entry says so.
    Refused,
}

/// What becomes of loopback addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Loopback {
    /// Only where an entry says so.
    #[default]
    Refused,
    /// They may be connected to. For dev mode.
    Allowed,
}

/// What the operator lets backends connect to. The default is that of production.
#[derive(Clone, Debug, Default)]
pub struct Policy {
    /// What is allowed although it would be refused.
    pub allow: Vec<Entry>,
    /// Private addresses without an entry.
    pub private: Private,
    /// Loopback addresses without an entry.
    pub loopback: Loopback,
}

impl Policy {
    /// The policy of an operator who listed `allow` and decided about private addresses.
    ///
    /// # Errors
    /// The first text that is no entry.
    pub fn of_settings(allow: &[String], private: Private) -> Result<Policy, InvalidEntry> {
        let allow = allow.iter().map(|text| text.parse()).collect::<Result<_, _>>()?;
        Ok(Policy { allow, private, loopback: Loopback::Refused })
    }

    /// The same policy with loopback allowed.
    #[must_use]
    pub fn with_loopback(self) -> Policy {
        Policy { loopback: Loopback::Allowed, ..self }
    }
}

/// An entry of the operator's allow-list: a host name, `*.suffix`, an address or a range (`10.0.0.0/8`), each with or
/// without `:port`. IPv6 with a port is written in brackets, e.g. `[fd00::1]:8200`.
///
/// A name is trusted with whatever it resolves to, but for metadata services: they need an entry with the address
/// itself. Of an IPv6 address that carries an IPv4 address, e.g. by NAT64, the entry names the IPv6 address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    place: Place,
    port: Option<u16>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    /// Lower case, ASCII, no dot at the end.
    Host(String),
    /// As a host, with the dot in front.
    Below(String),
    Range(Range),
}

/// Addresses that begin alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range {
    first: IpAddr,
    length: u32,
}

impl Range {
    fn only(ip: IpAddr) -> Range {
        Range { first: ip, length: width(ip) }
    }

    /// How many bits of an address are free.
    fn free(self) -> u32 {
        width(self.first) - self.length
    }

    fn contains(self, ip: IpAddr) -> bool {
        let fixed = |ip| bits(ip).checked_shr(self.free()).unwrap_or(0);
        self.first.is_ipv4() == ip.is_ipv4() && fixed(self.first) == fixed(ip)
    }
}

fn width(ip: IpAddr) -> u32 {
    if ip.is_ipv4() { 32 } else { 128 }
}

fn bits(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(ip) => ip.to_bits().into(),
        IpAddr::V6(ip) => ip.to_bits(),
    }
}

/// Why a text is no [`Entry`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{entry}`: {fault}; an entry is a host name, `*.suffix`, an address or a range such as `10.0.0.0/8`, with `:port` or without"
)]
pub struct InvalidEntry {
    entry: String,
    fault: &'static str,
}

impl FromStr for Entry {
    type Err = InvalidEntry;

    fn from_str(text: &str) -> Result<Self, InvalidEntry> {
        parse_entry(text).map_err(|fault| InvalidEntry { entry: text.to_owned(), fault })
    }
}

fn parse_entry(text: &str) -> Result<Entry, &'static str> {
    let (place, port) = match text.strip_prefix('[') {
        Some(rest) => match rest.split_once(']').ok_or("the bracket is not closed")? {
            (place, "") => (place, None),
            (place, rest) => (place, Some(rest.strip_prefix(':').ok_or("a port begins with a colon")?)),
        },
        // More than one colon: IPv6 without brackets, and so without a port.
        None => match text.split_once(':') {
            Some((place, port)) if !port.contains(':') => (place, Some(port)),
            _ => (text, None),
        },
    };
    let port = match port.map(str::parse) {
        None => None,
        Some(Ok(port @ 1..)) => Some(port),
        Some(_) => return Err("the port is no number from 1 to 65535"),
    };
    Ok(Entry { place: parse_place(place)?, port })
}

fn parse_place(text: &str) -> Result<Place, &'static str> {
    if let Some((first, length)) = text.split_once('/') {
        let first: IpAddr = first.parse().map_err(|_| "the range begins with no address")?;
        let length = length.parse().ok().filter(|length| *length <= width(first));
        let range = Range { first, length: length.ok_or("the range has no such length")? };
        if first.to_canonical() != first {
            return Err("the range is one of IPv4 addresses, which are written as such");
        }
        if bits(first) & u128::MAX.checked_shr(128 - range.free()).unwrap_or(0) != 0 {
            return Err("the range has bits beyond its length");
        }
        return Ok(Place::Range(range));
    }
    if let Ok(ip) = text.parse::<IpAddr>() {
        return Ok(Place::Range(Range::only(ip.to_canonical())));
    }
    match text.strip_prefix("*.") {
        Some(suffix) => Ok(Place::Below(format!(".{}", host_name(suffix)?))),
        None => host_name(text).map(Place::Host),
    }
}

/// A host name as URLs have it, without a dot at the end.
fn host_name(text: &str) -> Result<String, &'static str> {
    const NO_NAME: &str = "no host has this name";
    if text.contains(|c: char| c.is_ascii() && !c.is_ascii_alphanumeric() && !matches!(c, '-' | '.' | '_')) {
        return Err(NO_NAME);
    }
    let url = Url::parse(&format!("https://{text}")).map_err(|_| NO_NAME)?;
    let host = without_dot(url.host_str().ok_or(NO_NAME)?);
    if host.is_empty() {
        return Err(NO_NAME);
    }
    if host.parse::<IpAddr>().is_ok() {
        return Err("the address is not written in full");
    }
    Ok(host.to_owned())
}

fn without_dot(host: &str) -> &str {
    host.strip_suffix('.').unwrap_or(host)
}

impl Entry {
    /// Whether it names this place. `host` is as URLs have it, `ip` is canonical.
    fn names(&self, host: &str, ip: IpAddr, port: u16) -> bool {
        let host = without_dot(host);
        self.port.is_none_or(|own| own == port)
            && match &self.place {
                Place::Host(name) => host == name,
                Place::Below(suffix) => host.ends_with(&**suffix),
                Place::Range(range) => range.contains(ip),
            }
    }

    fn is_one_address(&self) -> bool {
        matches!(&self.place, Place::Range(range) if range.free() == 0)
    }
}

/// What decides where the clients of backends may connect to. Cheap to clone.
#[derive(Clone)]
pub struct Egress(Arc<Inner>);

struct Inner {
    policy: Policy,
    names: Arc<dyn Resolve>,
}

impl fmt::Debug for Egress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Egress").field(&self.0.policy).finish()
    }
}

impl Default for Egress {
    fn default() -> Self {
        Egress::new(Policy::default())
    }
}

impl Egress {
    /// Decides by `policy`; names resolve as the system does it.
    pub fn new(policy: Policy) -> Self {
        Egress::with_names(policy, Arc::new(SystemNames))
    }

    /// Decides by `policy`; names resolve as `names` says.
    pub fn with_names(policy: Policy, names: Arc<dyn Resolve>) -> Self {
        Egress(Arc::new(Inner { policy, names }))
    }

    /// Whether `ip` may be connected to, of which `host` (as a URL has it) is the name, if it has one.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check_address(&self, host: &str, ip: IpAddr, port: u16) -> Result<(), Refusal> {
        let policy = &self.0.policy;
        // The kernel takes an IPv4-mapped address for the IPv4 address.
        let ip = ip.to_canonical();
        let entries = || policy.allow.iter().filter(|entry| entry.names(host, ip, port));
        let stays = |refusal: &Refusal| match refusal {
            Refusal::Private if policy.private == Private::Allowed => false,
            Refusal::Loopback if policy.loopback == Loopback::Allowed && ip.is_loopback() => false,
            Refusal::Metadata => !entries().any(Entry::is_one_address),
            _ => entries().next().is_none(),
        };
        refusals(ip).find(stays).map_or(Ok(()), Err)
    }

    /// Whether a client for `endpoint` may be made. Decides about addresses; names are decided about when they are
    /// connected to, or by [`check_resolved`](Self::check_resolved).
    ///
    /// # Errors
    /// `EndpointRefused`.
    pub fn check_endpoint(&self, endpoint: &Endpoint) -> Result<(), BackendError> {
        let (host, port) = host_and_port(endpoint)?;
        match literal(host) {
            Some(ip) => Ok(self.check_address(host, ip, port)?),
            None => Ok(()),
        }
    }

    /// Whether `endpoint` may be connected to as things are now. For configurations: a name that does not resolve here
    /// and now may do so later, and is no error.
    ///
    /// # Errors
    /// `EndpointRefused`.
    pub async fn check_resolved(&self, endpoint: &Endpoint) -> Result<(), BackendError> {
        self.check_endpoint(endpoint)?;
        let (host, _) = host_and_port(endpoint)?;
        let Ok(name) = host.parse() else { return Ok(()) };
        if literal(host).is_some() {
            return Ok(());
        }
        match timeout(RESOLVING, self.resolver(endpoint)?.resolve(name)).await {
            Ok(Err(error)) => refusal_in(&*error).map_or(Ok(()), |refusal| Err(refusal.into())),
            Ok(Ok(_)) | Err(_) => Ok(()),
        }
    }

    /// What resolves the name of `endpoint`, and no other, to addresses that may be connected to.
    pub(crate) fn resolver(&self, endpoint: &Endpoint) -> Result<Arc<dyn Resolve>, BackendError> {
        let (host, port) = host_and_port(endpoint)?;
        Ok(Arc::new(Checked { egress: self.clone(), host: host.to_owned(), port }))
    }
}

fn host_and_port(endpoint: &Endpoint) -> Result<(&str, u16), BackendError> {
    let url = endpoint.url();
    let place = url.host_str().zip(url.port_or_known_default());
    place.ok_or(BackendError::InvalidConfig("the endpoint names no host"))
}

/// The address that the connector takes `host` for, by the same test: see `SocketAddrs::try_parse` of `hyper-util`.
fn literal(host: &str) -> Option<IpAddr> {
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    bare.parse().ok()
}

/// The refusal that made a request fail, if that is why it did.
pub fn refusal_in(error: &(dyn Error + 'static)) -> Option<Refusal> {
    std::iter::once(error).chain(causes(error)).find_map(|cause| cause.downcast_ref().copied())
}

/// What is behind `error`. An I/O error is no source of the one it wraps, so it is opened here.
pub(crate) fn causes<'a>(
    error: &'a (dyn Error + 'static),
) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(error.source(), |&cause| match cause.downcast_ref::<io::Error>() {
        Some(io) => io.get_ref().map(|inner| inner as &(dyn Error + 'static)),
        None => cause.source(),
    })
}

/// Resolves one name, to addresses that were checked or to nothing.
struct Checked {
    egress: Egress,
    host: String,
    port: u16,
}

impl Resolve for Checked {
    fn resolve(&self, name: Name) -> Resolving {
        let Checked { egress, host, port } = self;
        let (egress, host, port) = (egress.clone(), host.clone(), *port);
        Box::pin(async move {
            if name.as_str() != host {
                return Err(Refusal::Elsewhere.into());
            }
            let mut addresses: Vec<SocketAddr> = egress.0.names.resolve(name).await?.collect();
            for address in &mut addresses {
                // One that is refused spoils the name: who mixes them in means no good, or not this place.
                egress.check_address(&host, address.ip(), port)?;
                address.set_port(port);
            }
            Ok(Box::new(addresses.into_iter()) as Addrs)
        })
    }
}

/// Names as the system resolves them.
struct SystemNames;

impl Resolve for SystemNames {
    fn resolve(&self, name: Name) -> Resolving {
        Box::pin(async move {
            let find = move || Ok((name.as_str(), 0).to_socket_addrs()?.collect());
            let addresses: Vec<SocketAddr> = look_up(&LOOKUPS, find).await?;
            Ok(Box::new(addresses.into_iter()) as Addrs)
        })
    }
}

/// Lookups by the system at the same time. Each takes a thread of those that the process's own storage needs as well,
/// and keeps it for as long as the name's servers are silent, whoever still waits for it: tenants choose names, and
/// must not be able to take all of them.
static LOOKUPS: Semaphore = Semaphore::const_new(32);
/// How long a lookup waits for others to end, of a herd that connects at once. Waiting takes no thread.
const LOOKUP_WAITS: Duration = Duration::from_secs(1);

/// What `find` finds, by a thread of its own. The place is given back when the thread is.
async fn look_up<T: Send + 'static>(
    places: &'static Semaphore,
    find: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let place = timeout(LOOKUP_WAITS, places.acquire()).await;
    let place = place.map_err(|_| io::Error::other("too many names are being resolved"))?;
    let place = place.expect("the semaphore is never closed");
    let thread = spawn_blocking(move || {
        let found = find();
        drop(place);
        found
    });
    thread.await?
}

/// Everything that is to be said against an address.
fn refusals(ip: IpAddr) -> impl Iterator<Item = Refusal> {
    let (own, embedded) = match ip {
        IpAddr::V4(ip) => (against_v4(ip), [None; 3]),
        IpAddr::V6(ip) => (against_v6(ip), embedded(ip)),
    };
    own.into_iter().chain(embedded.into_iter().flatten().filter_map(against_v4))
}

/// By the IANA registry of special-purpose addresses. A host of its own is what is left.
fn against_v4(ip: Ipv4Addr) -> Option<Refusal> {
    Some(match ip.octets() {
        // AWS, Google, Azure and most others; the credentials of containers on ECS and EKS.
        [169, 254, 169, 254] | [169, 254, 170, 2 | 23] => Refusal::Metadata,
        // Alibaba; Azure's host agent; Oracle's classic cloud.
        [100, 100, 100, 200] | [168, 63, 129, 16] | [192, 0, 0, 192] => Refusal::Metadata,
        [127, ..] => Refusal::Loopback,
        [169, 254, ..] => Refusal::LinkLocal,
        [10, ..] | [172, 16..=31, ..] | [192, 168, ..] | [100, 64..=127, ..] => Refusal::Private,
        [0, ..] => Refusal::Unspecified,
        [224..=239, ..] => Refusal::Multicast,
        // Not assigned, and broadcast.
        [240..=255, ..] => Refusal::Reserved,
        // Protocols, documentation, relays of 6to4, benchmarks.
        [192, 0, 0 | 2, _] | [192, 88, 99, _] | [198, 18 | 19, ..] => Refusal::Reserved,
        [198, 51, 100, _] | [203, 0, 113, _] => Refusal::Reserved,
        _ => return None,
    })
}

/// As [`against_v4`], but for the IPv4 address that it may carry.
fn against_v6(ip: Ipv6Addr) -> Option<Refusal> {
    Some(match ip.segments() {
        // AWS for all its services; Google; Oracle, Scaleway, Linode, Alibaba.
        [0xfd00, 0xec2, ..] | [0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254] => Refusal::Metadata,
        [0xfd00, 0xc1, 0, 0, 0, 0, 0xa9fe, 0xa9fe] | [0xfd00, 0x42, 0, 0, 0, 0, 0, 0x42] => Refusal::Metadata,
        [0xfd00, 0xa9fe, 0xa9fe, 0, 0, 0, 0, 1] | [0xfd00, 0x100, 0, 0, 0, 0, 0x100, 0x200] => {
            Refusal::Metadata
        }
        [0, 0, 0, 0, 0, 0, 0, 0] => Refusal::Unspecified,
        [0, 0, 0, 0, 0, 0, 0, 1] => Refusal::Loopback,
        [0xfc00..=0xfdff, ..] => Refusal::Private,
        [0xfe80..=0xfebf, ..] => Refusal::LinkLocal,
        [0xff00..=0xffff, ..] => Refusal::Multicast,
        // NAT64 and Teredo: what they carry decides.
        [0x64, 0xff9b, 0, 0, 0, 0, ..] | [0x2001, 0, ..] => return None,
        // Protocols (2001::/23, benchmarks and ORCHIDs among them), documentation.
        [0x2001, 1..=0x1ff | 0xdb8, ..] | [0x3fff, 0..=0xfff, ..] => Refusal::Reserved,
        [0x2000..=0x3fff, ..] => return None,
        // Not assigned, or not for the internet: IPv4-compatible, discard, site-local, and NAT64 by a prefix of the
        // network's own (RFC 8215), which tells not where the IPv4 address stands.
        _ => Refusal::Reserved,
    })
}

/// The IPv4 addresses that are reached, or asked to relay, through an IPv6 address.
fn embedded(ip: Ipv6Addr) -> [Option<Ipv4Addr>; 3] {
    let v4 = |high: u16, low: u16| Some(Ipv4Addr::from_bits(u32::from(high) << 16 | u32::from(low)));
    let segments = ip.segments();
    let [first, second] = match segments {
        // IPv4-compatible (RFC 4291), but for `::` and `::1`; IPv4-translated (RFC 2765); NAT64 (RFC 6052).
        [0, 0, 0, 0, 0, 0, high @ 1..=0xffff, low]
        | [0, 0, 0, 0, 0xffff, 0, high, low]
        | [0x64, 0xff9b, 0, 0, 0, 0, high, low] => [v4(high, low), None],
        // 6to4 (RFC 3056).
        [0x2002, high, low, ..] => [v4(high, low), None],
        // Teredo (RFC 4380): the server, and the client with its bits turned.
        [0x2001, 0, high, low, _, _, client_high, client_low] => {
            [v4(high, low), v4(!client_high, !client_low)]
        }
        _ => [None, None],
    };
    let third = match segments {
        // ISATAP (RFC 5214), below any prefix.
        [_, _, _, _, 0 | 0x200, 0x5efe, high, low] => v4(high, low),
        _ => None,
    };
    [first, second, third]
}

#[cfg(test)]
mod tests;
