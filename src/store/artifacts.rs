//! Images and audio as files beside the database.
