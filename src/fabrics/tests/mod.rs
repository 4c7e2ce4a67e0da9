//! Tests that drive the target as a host does: by commands.

mod admin;
mod connect;
mod corpus;
mod events;
mod fences;
mod harness;
mod io;
mod lifetime;
mod publish;
