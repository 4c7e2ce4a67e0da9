//! The socket of a running target, in its state directory: one line of JSON asks, one document answers.
//!
//! ```text
//!   PID-START-N.sock    {"ask": "status"}                      -->  Status, or {"error": "..."}
//!                       {"ask": "status", "histograms": true}       the same with histograms
//!                       {"ask": "trace"}                       -->  TraceStatus
//! ```
//!
//! The directory is for its owner only, and so is the socket. A thread of its own answers, one client after another, each
//! within a deadline; the control thread is asked by a message, and never waits for a client.
//!
//! What it does not do: change anything.

use std::fmt;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::event::Event;
use super::status::Status;
use super::trace::{TraceStatus, collect};
use crate::extent::{Owner, StateDir};

const EXTENSION: &str = "sock";
/// What can be asked for.
const STATUS: &str = "status";
const TRACE: &str = "trace";
/// How long a client may take for its question, and to take the answer.
const CLIENT_PATIENCE: Duration = Duration::from_secs(2);
/// How long the control thread may take: it may be draining.
const CONTROL_PATIENCE: Duration = Duration::from_secs(30);
/// How long who asks waits for the answer.
const PATIENCE: Duration = CONTROL_PATIENCE.saturating_add(CLIENT_PATIENCE);
/// How long who looks on waits for one of several targets: the others are to be seen too.
const ONLOOKER_PATIENCE: Duration = Duration::from_secs(3);
/// After how long whoever waits longer than that is told for what.
const SILENCE: Duration = ONLOOKER_PATIENCE;
/// More than any question has.
const QUESTION_LEN_MAX: u64 = 4096;

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Question {
    ask: String,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    histograms: bool,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(untagged)]
enum Answer<T> {
    Error { error: String },
    Good(T),
}

impl<T> Answer<T> {
    fn of(answer: Option<T>) -> Self {
        answer.map_or_else(|| Self::Error { error: "the target is busy, or ending".to_owned() }, Self::Good)
    }
}

/// The socket, and the thread that answers. Dropped, both end.
pub(super) struct Api {
    path: PathBuf,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Api {
    /// Listens in the state directory.
    pub(super) fn start(state: &StateDir, events: Sender<Event>) -> io::Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        sweep(state.path());
        let me = Owner::this_process();
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = state.path().join(format!("{}-{}-{number}.{EXTENSION}", me.pid, me.start_time_ticks));
        let listener = UnixListener::bind(&path)?;
        let stop = Arc::<AtomicBool>::default();
        let told = Arc::clone(&stop);
        let thread = std::thread::Builder::new().name("control-api".to_owned()).spawn(move || {
            for client in listener.incoming() {
                if told.load(Ordering::Acquire) {
                    return;
                }
                if let Err(error) = client.and_then(|client| answer(client, &events)) {
                    tracing::debug!(%error, "a client of the control socket");
                }
            }
        });
        let thread = thread.inspect_err(|_| remove(&path))?;
        Ok(Self { path, stop, thread: Some(thread) })
    }
}

impl fmt::Debug for Api {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Api").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        // Wakes it; it finds that it is to end.
        let woken = UnixStream::connect(&self.path);
        remove(&self.path);
        // Without that it ends with the process.
        if woken.is_ok()
            && let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread of the control socket panicked");
        }
    }
}

fn remove(path: &Path) {
    if let Err(error) = std::fs::remove_file(path) {
        tracing::warn!(path = %path.display(), %error, "the control socket stays behind");
    }
}

/// Removes the sockets of processes that are gone.
fn sweep(state: &Path) {
    for path in sockets(state) {
        let is_dead = Owner::named_by(&path).is_some_and(|owner| !owner.is_alive());
        if is_dead {
            remove(&path);
        }
    }
}

fn sockets(state: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(state).into_iter().flatten().flatten();
    let paths = entries.map(|entry| entry.path());
    paths.filter(|path| path.extension().is_some_and(|extension| extension == EXTENSION)).collect()
}

fn answer(client: UnixStream, events: &Sender<Event>) -> io::Result<()> {
    client.set_read_timeout(Some(CLIENT_PATIENCE))?;
    client.set_write_timeout(Some(CLIENT_PATIENCE))?;
    let mut line = String::new();
    BufReader::new((&client).take(QUESTION_LEN_MAX)).read_line(&mut line)?;
    let failed = |error| serde_json::to_vec(&Answer::<()>::Error { error });
    let mut bytes = match serde_json::from_str::<Question>(&line) {
        Ok(question) if question.ask == STATUS => {
            let histograms = question.histograms;
            serde_json::to_vec(&Answer::of(told(events, |reply| Event::Status { histograms, reply })))
        }
        Ok(question) if question.ask == TRACE => {
            let copies = told(events, |reply| Event::Trace { reply });
            serde_json::to_vec(&Answer::of(copies.map(|copies| collect(&copies))))
        }
        Ok(question) => failed(format!("nobody knows what {:?} is", question.ask)),
        Err(error) => failed(error.to_string()),
    }?;
    bytes.push(b'\n');
    (&client).write_all(&bytes)
}

/// What the control thread answers.
fn told<T>(events: &Sender<Event>, ask: impl FnOnce(Sender<T>) -> Event) -> Option<T> {
    let (reply, answer) = channel();
    events.send(ask(reply)).ok()?;
    answer.recv_timeout(CONTROL_PATIENCE).ok()
}

/// Asks every target that serves with this state directory for its status. Those that do not answer are passed over, with
/// what they said instead, or what went wrong.
#[must_use]
pub fn ask_all(state: &Path) -> Vec<io::Result<Status>> {
    ask_each(state, &Question { ask: STATUS.to_owned(), histograms: false }, PATIENCE)
}

/// The same, with [`Status::histograms`], for who looks again and again: a target that hangs is not waited for as long.
#[must_use]
pub fn ask_all_with_histograms(state: &Path) -> Vec<io::Result<Status>> {
    ask_each(state, &Question { ask: STATUS.to_owned(), histograms: true }, ONLOOKER_PATIENCE)
}

/// Asks them for their last commands in the same way.
#[must_use]
pub fn ask_all_for_traces(state: &Path) -> Vec<io::Result<TraceStatus>> {
    ask_each(state, &Question { ask: TRACE.to_owned(), histograms: false }, PATIENCE)
}

/// Asks all side by side: one that hangs is waited for once, and nobody waits behind it.
fn ask_each<T: DeserializeOwned + Send>(
    state: &Path,
    question: &Question,
    patience: Duration,
) -> Vec<io::Result<T>> {
    let living: Vec<PathBuf> = sockets(state)
        .into_iter()
        .filter(|path| Owner::named_by(path).is_some_and(|owner| owner.is_alive()))
        .collect();
    let one = |path: &Path| match ask(path, question, patience, SILENCE) {
        Ok(Answer::Good(answer)) => Ok(answer),
        Ok(Answer::Error { error }) => Err(io::Error::other(error)),
        Err(error) => {
            // What a socket says of a time that is over is "resource temporarily unavailable".
            let (kind, why) = if is_over(&error) {
                (io::ErrorKind::TimedOut, format!("no answer within {} s", patience.as_secs()))
            } else {
                (error.kind(), error.to_string())
            };
            Err(io::Error::new(kind, format!("{}: {why}", path.display())))
        }
    };
    std::thread::scope(|scope| {
        let asking: Vec<_> = living.iter().map(|path| scope.spawn(move || one(path))).collect();
        let gone = |_| Err(io::Error::other("who asked ended before its time"));
        asking.into_iter().map(|asked| asked.join().unwrap_or_else(gone)).collect()
    })
}

/// Whether the time of a socket was over.
fn is_over(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

/// Asks one, which has `patience` to answer. After `silence`, if that is less, the log has for whom we wait.
fn ask<T: DeserializeOwned>(
    path: &Path,
    question: &Question,
    patience: Duration,
    silence: Duration,
) -> io::Result<Answer<T>> {
    let stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(patience.min(silence)))?;
    stream.set_write_timeout(Some(CLIENT_PATIENCE))?;
    let mut question = serde_json::to_vec(question)?;
    question.push(b'\n');
    (&stream).write_all(&question)?;
    let mut text = Vec::new();
    // What came before the time was over stays.
    let mut read = (&stream).read_to_end(&mut text);
    let rest = patience.saturating_sub(silence);
    if !rest.is_zero() && read.as_ref().is_err_and(is_over) {
        tracing::warn!(
            target_socket = %path.display(),
            most_s = rest.as_secs(),
            "a target does not answer yet: it hangs, is stopped, or is draining; waiting for it"
        );
        stream.set_read_timeout(Some(rest))?;
        read = (&stream).read_to_end(&mut text);
    }
    read?;
    Ok(serde_json::from_slice(&text)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_that_comes_late_and_in_pieces_is_heard_whole() {
        let state = tempfile::tempdir().unwrap();
        let path = state.path().join("late.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let late = std::thread::spawn(move || {
            let (client, _) = listener.accept().unwrap();
            BufReader::new(&client).read_line(&mut String::new()).unwrap();
            (&client).write_all(b"{\"pid\"").unwrap();
            std::thread::sleep(Duration::from_millis(300));
            (&client).write_all(b": 7}").unwrap();
        });
        let question = Question { ask: STATUS.to_owned(), histograms: false };
        let (patience, silence) = (Duration::from_secs(30), Duration::from_millis(20));
        let told = ask::<serde_json::Value>(&path, &question, patience, silence).unwrap();
        late.join().unwrap();
        assert!(matches!(told, Answer::Good(answer) if answer == serde_json::json!({ "pid": 7 })));
    }

    #[test]
    fn a_target_that_hangs_is_waited_for_once_and_the_others_are_heard() {
        let state = tempfile::tempdir().unwrap();
        let me = Owner::this_process();
        let socket = |number: u32| {
            let name = format!("{}-{}-{number}.{EXTENSION}", me.pid, me.start_time_ticks);
            UnixListener::bind(state.path().join(name)).unwrap()
        };
        let [_hangs, _hangs_too, answers] = [0, 1, 2].map(socket);
        let healthy = std::thread::spawn(move || {
            let (client, _) = answers.accept().unwrap();
            BufReader::new(&client).read_line(&mut String::new()).unwrap();
            (&client).write_all(b"{\"pid\": 7}").unwrap();
        });
        let question = Question { ask: STATUS.to_owned(), histograms: false };
        let begun = std::time::Instant::now();
        let told = ask_each::<serde_json::Value>(state.path(), &question, Duration::from_secs(1));
        assert!(begun.elapsed() >= Duration::from_secs(1));
        healthy.join().unwrap();
        let (heard, silent): (Vec<_>, Vec<_>) = told.into_iter().partition(Result::is_ok);
        assert_eq!(heard.into_iter().flatten().collect::<Vec<_>>(), [serde_json::json!({ "pid": 7 })]);
        let silent: Vec<io::Error> = silent.into_iter().filter_map(Result::err).collect();
        assert_eq!(silent.len(), 2);
        for error in silent {
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
            assert!(error.to_string().ends_with("no answer within 1 s"), "{error}");
        }
    }
}
