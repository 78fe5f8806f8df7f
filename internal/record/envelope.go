package record

import (
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strconv"

	"github.com/tinevm/tine/internal/errdef"
)

// maxEnvelope bounds an envelope: a payload in base64 and what is around it.
const maxEnvelope = maxPayload/3*4 + 4096

// Envelope is a record as it is kept and handed on: DSSE's JSON form, with one
// signature. Parse and Sign make one; it is not changed.
type Envelope struct {
	// Bytes are the envelope, a line without its end.
	Bytes []byte
	// Digest is that of the payload: the name that the next record of a chain
	// has for this one.
	Digest string
	// Record is what the payload says. Nothing of it is proven before a
	// signature is.
	Record Record

	payload, signature []byte
}

// sealed is the JSON form of any envelope.
type sealed struct {
	PayloadType string      `json:"payloadType"`
	Payload     string      `json:"payload"`
	Signatures  []signature `json:"signatures"`
}

type signature struct {
	KeyID string `json:"keyid"`
	Sig   string `json:"sig"`
}

// PAE is what DSSE signs: the type and the payload, each after its length.
func PAE(payloadType string, payload []byte) []byte {
	var b bytes.Buffer
	b.WriteString("DSSEv1 " + strconv.Itoa(len(payloadType)) + " " + payloadType + " " + strconv.Itoa(len(payload)) + " ")
	b.Write(payload)
	return b.Bytes()
}

// seal signs a payload.
func seal(payloadType string, payload []byte, key *Key) ([]byte, error) {
	sig := ed25519.Sign(key.private, PAE(payloadType, payload))
	return encodeJSON(sealed{
		PayloadType: payloadType,
		Payload:     base64.StdEncoding.EncodeToString(payload),
		Signatures:  []signature{{key.Public().ID(), base64.StdEncoding.EncodeToString(sig)}},
	})
}

// unseal returns what an envelope of that type holds, without any judgement of
// its signature. An envelope has one form; a line feed may follow it.
func unseal(data []byte, wantType string) (payload, sig []byte, keyID string, err error) {
	data = bytes.TrimSuffix(data, []byte("\n"))
	if len(data) > maxEnvelope {
		return nil, nil, "", invalid("envelope of more than %d bytes", maxEnvelope)
	}
	var s sealed
	if err = json.Unmarshal(data, &s); err != nil {
		return nil, nil, "", invalid("envelope: %w", err)
	}
	if again, encErr := encodeJSON(s); encErr != nil || !bytes.Equal(again, data) {
		return nil, nil, "", invalid("envelope is not in its one form")
	}
	if s.PayloadType != wantType || len(s.Signatures) != 1 {
		return nil, nil, "", invalid("envelope of type %.100q with %d signatures", s.PayloadType, len(s.Signatures))
	}
	if payload, err = base64.StdEncoding.Strict().DecodeString(s.Payload); err != nil {
		return nil, nil, "", invalid("payload: %w", err)
	}
	sig, err = base64.StdEncoding.Strict().DecodeString(s.Signatures[0].Sig)
	if err != nil || len(sig) != ed25519.SignatureSize {
		return nil, nil, "", invalid("signature is not one of Ed25519")
	}
	return payload, sig, s.Signatures[0].KeyID, nil
}

// Parse reads an envelope and the record in it. It judges the form only; Verify
// judges the signature. A record of another version is errdef.ErrUnsupported.
func Parse(data []byte) (Envelope, error) {
	payload, sig, keyID, err := unseal(data, payloadType)
	if err != nil {
		return Envelope{}, err
	}
	r, err := decodeStatement(payload)
	if err != nil {
		return Envelope{}, err
	}
	if r.KeyID != keyID {
		return Envelope{}, invalid("the envelope names another key than the record")
	}
	line := bytes.Clone(bytes.TrimSuffix(data, []byte("\n")))
	return Envelope{Bytes: line, Digest: Digest(payload), Record: r, payload: payload, signature: sig}, nil
}

// sign makes the envelope of a record that is complete.
func sign(r Record, key *Key) (Envelope, error) {
	payload, err := encodeStatement(r)
	if err != nil {
		return Envelope{}, err
	}
	data, err := seal(payloadType, payload, key)
	if err != nil {
		return Envelope{}, err
	}
	e, err := Parse(data) // nothing is signed that cannot be read
	if err != nil {
		return Envelope{}, fmt.Errorf("sign record: %w", err)
	}
	return e, nil
}

// verifySignature returns errdef.ErrDenied when the signature is not key's.
func (e Envelope) verifySignature(key Public) error {
	if !ed25519.Verify(key.key, PAE(payloadType, e.payload), e.signature) {
		return fmt.Errorf("%w: the signature of record %s is not that of key %s", errdef.ErrDenied, e.Record.ID, key.ID())
	}
	return nil
}
