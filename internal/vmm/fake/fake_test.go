package fake_test

import (
	"testing"

	"github.com/tinevm/tine/internal/vmm/fake"
	"github.com/tinevm/tine/internal/vmm/vmmtest"
)

func TestEngine(t *testing.T) {
	vmmtest.Run(t, vmmtest.Setup{Engine: fake.New()})
}
