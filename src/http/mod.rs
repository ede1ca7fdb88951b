//! The HTTP faces: native jobs (`jobs`), the OpenAI shim (`openai`), operations (`ops`). `error` alone turns errors into
//! a status and a body.
