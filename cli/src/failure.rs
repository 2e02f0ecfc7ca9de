//! What went wrong and what to do next. Every failure ends in a next step.

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use scaivault_domain::time::format_duration;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::output::printable;

/// How the process ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// Done.
    Ok = 0,
    /// The command line or its input is wrong; nothing was sent.
    Usage = 1,
    /// The server refused or failed.
    Server = 2,
    /// The server did what was asked, but not all of it: something was left out or differs.
    Differences = 3,
    /// Nobody reads our output any more; as if the signal had ended us.
    ReaderGone = 141,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit as u8)
    }
}

/// Why a command did not do what was asked.
#[derive(Debug)]
pub(crate) struct Failure {
    exit: Exit,
    message: String,
    /// E.g. `code: not_found, request id: …`.
    about: Vec<String>,
    /// Wrong fields, and what is wrong with them.
    violations: Vec<(String, String)>,
    next: String,
}

impl Failure {
    /// The command line or its input is wrong.
    pub(crate) fn usage(message: impl Into<String>, next: impl Into<String>) -> Self {
        Self::new(Exit::Usage, message.into(), next.into())
    }

    /// The server does not have, or does not answer, what was asked.
    pub(crate) fn server(message: impl Into<String>, next: impl Into<String>) -> Self {
        Self::new(Exit::Server, message.into(), next.into())
    }

    /// The server did not do all of what was asked.
    pub(crate) fn differences(message: impl Into<String>, next: impl Into<String>) -> Self {
        Self::new(Exit::Differences, message.into(), next.into())
    }

    /// The server answered something that this program does not understand.
    pub(crate) fn strange_answer(what: &str) -> Self {
        Self::server(
            format!("the server's answer has {what}"),
            "check that the server and this program are of the same version (`scaivault --version`)",
        )
    }

    fn new(exit: Exit, message: String, next: String) -> Self {
        Failure { exit, message, about: Vec::new(), violations: Vec::new(), next }
    }

    /// How the process ends.
    pub(crate) fn exit(&self) -> Exit {
        self.exit
    }

    /// Writes what happened and what to do next. A reader that is gone is told nothing.
    pub(crate) fn tell(&self, out: &mut dyn Write, colour: bool) {
        if self.exit == Exit::ReaderGone {
            return;
        }
        // Nothing is left to be done if even this cannot be written.
        let _ = self.write(out, colour);
    }

    fn write(&self, out: &mut dyn Write, colour: bool) -> io::Result<()> {
        let (red, bold, plain) = if colour { ("\x1b[1;31m", "\x1b[1m", "\x1b[0m") } else { ("", "", "") };
        let about = match &self.about[..] {
            [] => String::new(),
            about => format!(" ({})", about.join(", ")),
        };
        writeln!(out, "{red}error:{plain} {}{}", printable(&self.message), printable(&about))?;
        for (field, detail) in &self.violations {
            writeln!(out, "  {}: {}", printable(field), printable(detail))?;
        }
        writeln!(out, "{bold}next:{plain} {}", printable(&self.next))
    }
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        if let Some(broken) = std::error::Error::source(&status) {
            return Failure::server(
                format!("the call broke off: {}", deepest(broken)),
                "check that SCAIVAULT_ADDR is a ScaiVault server, then try again",
            );
        }
        let details = status.get_error_details();
        let code =
            details.error_info().map_or_else(|| code_name(status.code()), |info| info.reason.to_lowercase());
        let mut failure = Failure::server(sentence(&status), "");
        failure.about.push(format!("code: {code}"));
        let told = details.request_info().map(|info| info.request_id.clone());
        let header = || Some(status.metadata().get("x-request-id")?.to_str().ok()?.to_owned());
        if let Some(id) = told.filter(|id| !id.is_empty()).or_else(header) {
            failure.about.push(format!("request id: {id}"));
        }
        let violations = details.bad_request().map(|bad| &bad.field_violations[..]).unwrap_or_default();
        // A single wrong field is often the whole message.
        failure.violations = violations
            .iter()
            .filter(|v| !failure.message.ends_with(&v.description))
            .map(|v| (v.field.clone(), v.description.clone()))
            .collect();

        let told = details.error_info().and_then(|info| info.metadata.get("next_step"));
        let after = details.retry_info().and_then(|info| info.retry_delay);
        failure.next = match (told, after) {
            (Some(step), Some(after)) => format!("{step} (try again in {})", seconds(after)),
            (Some(step), None) => step.clone(),
            (None, Some(after)) => format!("try again in {}", seconds(after)),
            (None, None) => step_for(status.code()).to_owned(),
        };
        failure
    }
}

impl From<scaivault_domain::Error> for Failure {
    /// What the server would have refused is refused before it is asked.
    fn from(error: scaivault_domain::Error) -> Self {
        let next = error.next_step.map_or_else(
            || "correct the input; `scaivault help` shows how it is written".to_owned(),
            std::borrow::Cow::into_owned,
        );
        let mut failure = Failure::usage(error.message, next);
        failure.about.push(format!("code: {}", error.reason.code()));
        failure
    }
}

impl From<io::Error> for Failure {
    /// The answer could not be written out.
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::BrokenPipe {
            return Self::new(Exit::ReaderGone, String::new(), String::new());
        }
        Self::server(
            format!("the answer cannot be written: {error}"),
            "check the disk and where the output goes",
        )
    }
}

/// The innermost cause: what wraps it only says "transport error".
pub(crate) fn deepest(mut error: &(dyn std::error::Error + 'static)) -> String {
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

fn sentence(status: &Status) -> String {
    match status.message() {
        "" => format!("the server answered {}", code_name(status.code())),
        message => message.to_owned(),
    }
}

/// `DeadlineExceeded` as `deadline_exceeded`.
fn code_name(code: Code) -> String {
    let mut name = String::new();
    for letter in format!("{code:?}").chars() {
        if letter.is_ascii_uppercase() && !name.is_empty() {
            name.push('_');
        }
        name.push(letter.to_ascii_lowercase());
    }
    name
}

fn seconds(after: Duration) -> String {
    format_duration(Duration::from_secs(after.as_millis().div_ceil(1000).try_into().unwrap_or(u64::MAX)))
}

fn step_for(code: Code) -> &'static str {
    match code {
        Code::Unauthenticated => "set SCAIVAULT_TOKEN or SCAIVAULT_TOKEN_FILE to a token that is still valid",
        Code::PermissionDenied => {
            "`scaivault token lookup` shows what your token may do; ask an administrator for more"
        }
        Code::NotFound => {
            "check the spelling; `scaivault list` and `scaivault backend list` show what is there"
        }
        Code::AlreadyExists => "choose another name, or change what is there",
        Code::InvalidArgument | Code::OutOfRange => {
            "correct the input; `scaivault help` shows how it is written"
        }
        Code::FailedPrecondition | Code::Aborted => "look at the current state, then try again",
        Code::ResourceExhausted => "wait a little, then try again",
        Code::Unimplemented => "check that SCAIVAULT_ADDR is a ScaiVault server of this version",
        Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled => {
            "try again; if it stays, `scaivault health` tells whether the server is ready"
        }
        Code::Ok | Code::Unknown | Code::Internal | Code::DataLoss => {
            "look for the request id in the server's log"
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use tonic_types::{ErrorDetails, FieldViolation};

    use super::*;

    fn told(failure: &Failure) -> String {
        let mut out = Vec::new();
        failure.tell(&mut out, false);
        String::from_utf8(out).expect("UTF-8")
    }

    #[test]
    fn a_refusal_shows_code_fields_request_and_next_step() {
        let mut details = ErrorDetails::with_error_info(
            "INVALID_CONFIG",
            "scaivault",
            HashMap::from([("next_step".to_owned(), "name an https URL".to_owned())]),
        );
        details.set_bad_request(vec![
            FieldViolation::new("/config/endpoint", "begins with https://"),
            FieldViolation::new("/mode", "is `proxy`"),
        ]);
        details.set_request_info("req_1", "");
        details.set_retry_info(Some(Duration::from_millis(4200)));
        let status = Status::with_error_details(
            Code::InvalidArgument,
            "config.endpoint: begins with https://",
            details,
        );
        let failure = Failure::from(status);
        assert_eq!(
            told(&failure),
            "error: config.endpoint: begins with https:// (code: invalid_config, request id: req_1)\n  \
             /mode: is `proxy`\nnext: name an https URL (try again in 5s)\n"
        );
        assert_eq!(failure.exit(), Exit::Server);
    }

    #[test]
    fn every_refusal_has_a_next_step() {
        for number in 0..=16 {
            let failure = Failure::from(Status::new(Code::from_i32(number), "no"));
            assert!(!failure.next.is_empty(), "{number}");
        }
        assert!(told(&Failure::from(Status::deadline_exceeded(""))).contains("code: deadline_exceeded"));
    }

    #[test]
    fn a_server_cannot_write_to_the_terminal_through_an_error() {
        let failure = Failure::from(Status::internal("\x1b]0;owned\x07"));
        assert!(!told(&failure).contains('\x1b'));
    }

    #[test]
    fn a_reader_that_left_is_told_nothing() {
        let failure = Failure::from(io::Error::from(io::ErrorKind::BrokenPipe));
        assert_eq!((told(&failure).as_str(), failure.exit()), ("", Exit::ReaderGone));
    }
}
