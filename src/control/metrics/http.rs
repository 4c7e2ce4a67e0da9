//! As much of HTTP/1.1 as `GET /metrics` takes: one request a connection, read into a bounded buffer.
//!
//! [`look`] is a plain function over the bytes so far, and never panics; the fuzz target `metrics_request` is its body.
//! What it does not do: bodies, keep-alive, other methods than GET.

/// The longest request line and headers that are read, in bytes. A scraper's have some hundred.
pub(super) const REQUEST_LEN_MAX: usize = 8192;

/// What the bytes so far ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    /// More bytes are needed to tell.
    Unfinished,
    /// The page.
    Metrics,
    /// Something that is refused.
    Refused(Refusal),
}

/// Why a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// It is no HTTP/1 request.
    Malformed,
    /// Another page.
    NotFound,
    /// Another method than GET.
    Method,
    /// It does not end in time or within [`REQUEST_LEN_MAX`].
    TooLarge,
    /// The target has no time to tell.
    Busy,
}

impl Refusal {
    /// The status line's code and reason (RFC 9110, section 15; RFC 6585, section 5).
    const fn status(self) -> &'static str {
        match self {
            Self::Malformed => "400 Bad Request",
            Self::NotFound => "404 Not Found",
            Self::Method => "405 Method Not Allowed",
            Self::TooLarge => "431 Request Header Fields Too Large",
            Self::Busy => "503 Service Unavailable",
        }
    }
}

/// What `request`, all the bytes so far, asks for.
pub(super) fn look(request: &[u8]) -> Asked {
    let Some(head_len) = head_len(request) else {
        return if request.len() >= REQUEST_LEN_MAX {
            Asked::Refused(Refusal::TooLarge)
        } else {
            Asked::Unfinished
        };
    };
    let head = request.get(..head_len).unwrap_or_default();
    let line = head.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let mut words = line.split(|byte| *byte == b' ');
    let (Some(method), Some(target), Some(version), None) =
        (words.next(), words.next(), words.next(), words.next())
    else {
        return Asked::Refused(Refusal::Malformed);
    };
    if !version.starts_with(b"HTTP/1.") || method.is_empty() || !method.iter().all(u8::is_ascii_uppercase) {
        return Asked::Refused(Refusal::Malformed);
    }
    // What follows a question mark changes nothing.
    let path = target.split(|byte| *byte == b'?').next().unwrap_or_default();
    match (method, path) {
        (b"GET", b"/metrics") => Asked::Metrics,
        (_, b"/metrics") => Asked::Refused(Refusal::Method),
        _ => Asked::Refused(Refusal::NotFound),
    }
}

/// The length of request line and headers; `None` before the empty line that ends them.
fn head_len(request: &[u8]) -> Option<usize> {
    let ends = [&b"\r\n\r\n"[..], &b"\n\n"[..]];
    let found = ends.into_iter().filter_map(|end| {
        request.windows(end.len()).position(|window| window == end).map(|at| at + end.len())
    });
    found.min()
}

/// The answer with the page.
pub(super) fn page(text: &str) -> Vec<u8> {
    // The format that prometheus-client writes.
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    response("200 OK", kind, "", text)
}

/// The answer that refuses.
pub(super) fn refused(refusal: Refusal) -> Vec<u8> {
    let more = if refusal == Refusal::Method { "Allow: GET\r\n" } else { "" };
    let status = refusal.status();
    response(status, "text/plain; charset=utf-8", more, &format!("{status}: only GET /metrics is answered\n"))
}

fn response(status: &str, kind: &str, more: &str, body: &str) -> Vec<u8> {
    let len = body.len();
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len}\r\n{more}Connection: close\r\n\r\n{body}"
    )
    .into_bytes()
}

/// Feeds arbitrary bytes to [`look`], all at once and byte by byte: what is answered must not depend on how the bytes
/// arrive. The body of the fuzz target, and of the test that replays its corpus.
///
/// # Panics
/// When it does: that is what a fuzzer looks for.
pub fn fuzz_metrics_request(data: &[u8]) {
    let data = data.get(..REQUEST_LEN_MAX).unwrap_or(data);
    let whole = look(data);
    let first = (0..=data.len()).map(|len| look(data.get(..len).unwrap_or_default()));
    let settled = first.into_iter().find(|asked| *asked != Asked::Unfinished).unwrap_or(Asked::Unfinished);
    assert_eq!(settled, whole, "the answer depends on how the request is cut");
    if let Asked::Refused(refusal) = whole {
        assert!(refused(refusal).starts_with(b"HTTP/1.1 4"));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_scrape_is_understood_and_nothing_else() {
        let refused = |refusal| Asked::Refused(refusal);
        let cases: [(&[u8], Asked); 12] = [
            (b"GET /metrics HTTP/1.1\r\nHost: localhost:9464\r\n\r\n", Asked::Metrics),
            (b"GET /metrics?x=1 HTTP/1.0\r\n\r\n", Asked::Metrics),
            (b"GET /metrics HTTP/1.1\n\n", Asked::Metrics),
            (b"GET /metrics HTTP/1.1\r\nHost: localhost", Asked::Unfinished),
            (b"", Asked::Unfinished),
            (b"POST /metrics HTTP/1.1\r\n\r\n", refused(Refusal::Method)),
            (b"GET / HTTP/1.1\r\n\r\n", refused(Refusal::NotFound)),
            (b"GET /metrics/../../etc/passwd HTTP/1.1\r\n\r\n", refused(Refusal::NotFound)),
            (b"GET /metrics\r\n\r\n", refused(Refusal::Malformed)),
            (b"GET  /metrics HTTP/1.1\r\n\r\n", refused(Refusal::Malformed)),
            (b"\r\n\r\n", refused(Refusal::Malformed)),
            (b"PRI * HTTP/2.0\r\n\r\n", refused(Refusal::Malformed)),
        ];
        for (request, expected) in cases {
            assert_eq!(look(request), expected, "{}", String::from_utf8_lossy(request));
        }
        assert_eq!(look(&[b'a'; REQUEST_LEN_MAX]), refused(Refusal::TooLarge));
        assert_eq!(look(&[b'a'; REQUEST_LEN_MAX - 1]), Asked::Unfinished);
    }

    #[test]
    fn the_corpus_replays_without_a_panic() {
        let corpus = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus/metrics_request");
        let mut files = 0;
        for entry in std::fs::read_dir(&corpus).expect("the corpus is part of the repository") {
            fuzz_metrics_request(&std::fs::read(entry.expect("an entry").path()).expect("a corpus file"));
            files += 1;
        }
        assert!(files >= 6, "only {files} files");
    }

    proptest! {
        #[test]
        fn no_bytes_panic(data in proptest::collection::vec(any::<u8>(), 0..300)) {
            fuzz_metrics_request(&data);
        }

        #[test]
        fn nearly_a_request_does_not_panic(text in "(GET|POST|get)? ?/?(metrics)?[? ]{0,2}(HTTP/1.1)?[\r\n]{0,5}.{0,20}") {
            fuzz_metrics_request(text.as_bytes());
        }
    }
}
